"""Debian's Docker in a lab that has a Docker Hub of its own.

What lives here: `DockerHub`, docker-registry and a token server by Docker Hub's names; `Placed`, hosts whose programs
find it by them; and `Docker`, the engine. What never does: the machine's own Docker, its containerd, its /etc/docker.

    /etc/hosts       where Docker Hub is: a file of the lab, bound over the machine's
    /etc/docker      of each engine: ROOT/NAME/etc with its daemon.json, likewise
    /run             of each engine: empty, so that it finds nobody's containerd there and starts its own

All three in a mount namespace of the program's own. Docker trusts the system's authorities for Docker Hub, and no
others: it gets the lab's as the system's, by SSL_CERT_FILE.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.fakes.authority import Authority
from tests.lab.cleanup import Lab
from tests.lab.network import Host, Network
from tests.lab.processes import LabFailed, Process, unix_get
from tests.lab.registry import DockerRegistry
from tests.lab.tokens import TokenServer

CGROUPS = f"dadi-docker-{os.getpid()}"
"""The cgroup that containers are below."""
_REGISTRY, _TOKENS = "registry-1.docker.io", "auth.docker.io"


class Placed(Host):
    """A host whose programs see files and directories of the lab in the place of the machine's."""

    def __init__(self, host: Host, places: Mapping[str, Path], empty: str = "") -> None:
        """`places`: what is seen, by the path on the machine; `empty`: a directory with nothing in it."""
        super().__init__(host.name, host.namespace, host.address, host._hub, host._port)
        self.bare, self.places = host, dict(places)
        script = "".join(f"mount --bind '{ours}' {path} && " for path, ours in places.items())
        script += f"mount -t tmpfs tmpfs {empty} && " if empty else ""
        self._prefix = [*host.prefix, "unshare", "--mount", "--", "sh", "-c", f'{script}exec "$@"', "sh"]

    @property
    def prefix(self) -> list[str]:
        """See `Host`."""
        return self._prefix


class DockerHub(DockerRegistry):
    """docker-registry over TLS, which sends all for a token, on a host; its token server on another. Enter it.

    `hosts`: a file for /etc/hosts; `authority.file`: whom to trust.
    """

    def __init__(self, lab: Lab, network: Network) -> None:
        host, tokens = network.host("docker-hub"), network.host("docker-tokens")
        self.authority = Authority(lab.root / "tls")
        self.tokens = TokenServer(tokens, _TOKENS, self.authority)
        self._certificate = self.authority.issue(_REGISTRY, [_REGISTRY])
        self.hosts = lab.root / "hosts"
        self.hosts.write_text(f"127.0.0.1 localhost\n{host.address} {_REGISTRY}\n{tokens.address} {_TOKENS}\n")
        directory = lab.root / host.name
        super().__init__(directory, 443, address=host.address, prefix=host.prefix, environment=lab.environment)

    def start(self) -> None:
        """See `DockerRegistry`."""
        self.tokens.start()
        super().start()

    def stop(self) -> None:
        """End both; see `DockerRegistry`."""
        self.tokens.stop()
        super().stop()

    def _configuration(self) -> dict[str, object]:
        found = super()._configuration()
        certificate, key = self._certificate
        http = {"addr": self.host, "secret": "not one", "tls": {"certificate": certificate, "key": key}}
        return {**found, "http": http, "auth": {"token": self.tokens.settings}}


class Docker(Process):
    """dockerd on `host`, which knows the lab's Docker Hub. `daemon`: the text of its /etc/docker/daemon.json."""

    def __init__(self, lab: Lab, host: Placed, name: str, daemon: str, authority: str) -> None:
        self._lab = lab
        self._directory = lab.root / name
        self.socket = self._directory / "sock"
        etc = self._directory / "etc"
        etc.mkdir(parents=True)
        (etc / "daemon.json").write_text(daemon)
        command = ["dockerd", f"--host=unix://{self.socket}", f"--data-root={self._directory / 'data'}",
                   "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none",
                   f"--cgroup-parent=/{CGROUPS}"]  # fmt: skip
        own = Placed(host.bare, {**host.places, "/etc/docker": etc}, empty="/run")
        super().__init__(lab, name, command, host=own, environment={"SSL_CERT_FILE": authority})
        self.wait_until(lambda: unix_get(self.socket, "/_ping")[0] == 200)

    def docker(self, *arguments: str, check: bool = True, says: str = "") -> subprocess.CompletedProcess[str]:
        """Run `docker` against this engine; `says`: what it reads. Raises LabFailed if it fails (`check`)."""
        environment = {**self._lab.environment, "DOCKER_HOST": f"unix://{self.socket}",
                       "DOCKER_CONFIG": str(self._directory / "client")}  # fmt: skip
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, env=environment,
                              input=says, timeout=120)  # fmt: skip
        if check and done.returncode != 0:
            raise LabFailed(f"docker {' '.join(arguments)}: {done.stderr.strip()}\n{self.tail()}")
        return done

    def run(self, image: str, *command: str) -> str:
        """Run a container without a network until it ends; return what it printed."""
        # containers do not inherit our environment, and the lab finds its processes by it
        mark = [f"--env={key}={self._lab.environment[key]}" for key in ("DADI_LAB", "DADI_LAB_ROOT")]
        return self.docker("run", "--rm", "--network=none", *mark, image, *command).stdout
