"""Docker, as it is in Debian, pulls through the proxy by the line of the README, from a Docker Hub of the lab's own.

Two nodes, each with a proxy and a dockerd, and one superpeer; on the first all is as the README has it, the proxy of
the second has `login = true` and `uploads = "pass"`. Docker Hub gives nothing to who shows no token, and tokens for
lab/… to everybody, as the real one does; all others of its repositories are private. podman is here too for that: it
asks for its tokens by the name that a repository has at the proxy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab import host as this_machine
from tests.lab import images, oci_layout, pushing
from tests.lab.cleanup import Lab
from tests.lab.containers import containerd_lab
from tests.lab.docker import CGROUPS, Docker, DockerHub, Placed
from tests.lab.network import Host, Network
from tests.lab.oci_layout import Image
from tests.lab.processes import REPOSITORY, Process
from tests.lab.registry import PASSWORD, USER, DockerRegistry

pytestmark = [
    pytest.mark.root,
    pytest.mark.programs("dockerd", "docker", "docker-registry", "ip", "nsenter", "unshare"),
    pytest.mark.timeout(300),
]

PROXY = "127.0.0.1:7072"
README = (REPOSITORY / "README.md").read_text()
DATA = random.Random(1).randbytes(1 << 20)


@dataclass
class Site:
    """A Docker Hub, a superpeer, two nodes with a proxy and Docker each, and what Docker Hub has."""

    lab: Lab
    hub: DockerHub
    superpeer: Process
    proxies: list[Process]
    engines: list[Docker]
    images: dict[str, Image]

    def copies(self, name: str, expected: float) -> float:
        """Return how often Docker Hub has sent the layers of an image; it writes its log when it has sent them."""
        sizes = {layer.blob.digest: layer.blob.size for layer in self.images[name].layers}
        deadline = time.monotonic() + 5
        while True:
            found = sum(
                request.size for request in self.hub.access_log()
                if request.method == "GET" and request.status < 300 and request.path.startswith(f"/v2/{name}/blobs/")
                and request.path.rpartition("/")[2] in sizes
            ) / sum(sizes.values())  # fmt: skip
            if found >= expected or time.monotonic() > deadline:
                return found
            time.sleep(0.01)

    def status(self, number: int) -> dict[str, Any]:
        """Return GET /v1/status of a proxy."""
        host = self.proxies[number].host
        assert host is not None
        value: dict[str, Any] = json.loads(host.get("127.0.0.1", 7072, "/v1/status")[1])
        return value

    def served(self, number: int) -> int:
        """Return how many bytes of blobs a proxy has sent."""
        found: int = self.status(number)["served"]["bytes"]
        return found

    def log_in(self, number: int, *registry: str) -> None:
        self.engines[number].docker("login", "--username", USER, "--password-stdin", *registry, says=PASSWORD)


def daemon(lab: Lab, host: Host, module: str, port: int, text: str, listen: str = "127.0.0.1", *,
           name: str = "") -> Process:  # fmt: skip
    """Start a program of ours with a configuration, and no more in it than what differs from the defaults."""
    directory = lab.root / f"{host.name}-{name or module}"
    directory.mkdir()
    file = directory / "config.toml"
    file.write_text(f'state = "{directory / "state"}"\nlog_json = true\n{text}')
    process = Process(lab, directory.name, [sys.executable, "-m", module, "--config", str(file)], host=host)
    process.wait_until(lambda: host.get(listen, port, "/healthz")[0] == 200)
    return process


def node(lab: Lab, hub: DockerHub, host: Placed, superpeer: str, front: str) -> tuple[Process, Docker]:
    """Start a proxy, and dockerd by the README's line."""
    (line,) = re.findall(r"`(\{.*registry-mirrors.*\})`", README)
    assert json.loads(line) == {"registry-mirrors": [f"http://{PROXY}"]}
    text = f'superpeers = ["{superpeer}"]\n{front}[registry]\nca_file = "{hub.authority.file}"\n'
    proxy = daemon(lab, host, "registry_proxy", 7072, text)
    return proxy, Docker(lab, host, f"{host.name}-docker", line, hub.authority.file)


def with_a_shell(directory: Path, tree: Path) -> Image:
    """Make an image that a container can be run of, with DATA as /data."""
    tree.mkdir()
    steps = images.Steps(directory, tree, "fast-gzip")
    this_machine.copy_shell(tree)
    steps.layer()
    (tree / "data").write_bytes(DATA)
    steps.layer()
    steps.image("1", ["/bin/sh"])
    return oci_layout.load(directory, "1")


def fill(lab: Lab, hub: DockerHub, network: Network) -> dict[str, Image]:
    """Put images where Docker Hub has its own, while it is an ordinary registry."""
    found = {"lab/app": with_a_shell(lab.root / "app", lab.root / "tree")}
    for seed, name in enumerate(("lab/refused", "lab/down", "lab/named", "private/app")):
        found[name] = images.synthetic(lab.root / f"image-{seed}", layers=2, size=1 << 18, seed=seed)
    host = network.hosts["docker-hub"]
    hub.directory.mkdir()
    with DockerRegistry(hub.directory, 80, address=host.address, prefix=host.prefix, environment=lab.environment):
        for name, image in found.items():
            host.inside(lambda image=image, name=name: pushing.push(image, host.address, name, "1"))
    return found


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with containerd_lab(CGROUPS) as lab:
        network = Network(lab, "10.238.0")
        hub = DockerHub(lab, network)
        made = fill(lab, hub, network)
        places = {"/etc/hosts": hub.hosts}
        hosts = [Placed(network.host(name), places) for name in ("superpeer", "first", "second")]
        address = hosts[0].address
        at_once = "[originals]\ntag_ttl = 0\naccess_ttl = 0\npatience = 0.5\n"
        trust = f'[registry]\nca_file = "{hub.authority.file}"\nretries = 1\nbackoff = 0.05\n'
        fronts = ("", '[front]\nlogin = true\nuploads = "pass"\n')
        with hub, ThreadPoolExecutor() as pool:
            text = f'listen = "{address}:7070"\n{at_once}{trust}'
            superpeer = pool.submit(daemon, lab, hosts[0], "superpeer", 7070, text, address)
            nodes = [pool.submit(node, lab, hub, host, f"http://{address}:7070", front)
                     for host, front in zip(hosts[1:], fronts, strict=True)]  # fmt: skip
            proxies, engines = zip(*(each.result() for each in nodes), strict=True)
            yield Site(lab, hub, superpeer.result(), list(proxies), list(engines), made)


def test_two_engines_pull_and_run_and_docker_hub_sends_one_copy(site: Site) -> None:
    for number, engine in enumerate(site.engines):
        engine.docker("pull", "lab/app:1")
        assert engine.run("lab/app:1", "sha256sum", "/data").split()[0] == hashlib.sha256(DATA).hexdigest()
        assert site.status(number)["served"]["requests"] >= 3, "not past the proxy"
    assert site.copies("lab/app", 1.0) == 1.0


def test_what_is_here_is_pulled_while_docker_hub_is_away(site: Site) -> None:
    engine = site.engines[0]
    engine.docker("pull", "lab/app:1")
    engine.docker("rmi", "lab/app:1")
    stale, served = site.status(0)["requests"]["stale"], site.served(0)
    site.hub.stop()
    try:
        engine.docker("pull", "lab/app:1")
    finally:
        site.hub.start()
    assert site.status(0)["requests"]["stale"] > stale
    assert site.served(0) > served


def test_private_images_come_through_a_proxy_that_asks_for_a_login_and_else_past_it(site: Site) -> None:
    served = [site.served(number) for number in (0, 1)]
    for number, engine in enumerate(site.engines):
        refused = engine.docker("pull", "private/app:1", check=False)
        assert refused.returncode != 0, "nobody has logged in"
        site.log_in(number)
        engine.docker("pull", "private/app:1")
        assert (site.served(number) > served[number]) == (number == 1)
    assert site.copies("private/app", 2.0) == 2.0
    assert all(PASSWORD not in each.log.read_text() for each in (*site.proxies, site.superpeer))


def test_a_push_through_the_proxy_is_passed_on_where_that_is_configured(site: Site) -> None:
    first, second = site.engines
    for engine in site.engines:
        engine.docker("pull", "lab/app:1")
        engine.docker("tag", "lab/app:1", f"{PROXY}/private/pushed:1")
    refused = first.docker("push", f"{PROXY}/private/pushed:1", check=False)
    assert refused.returncode != 0
    assert "push to the registry itself" in refused.stderr
    site.log_in(1, PROXY)
    second.docker("push", f"{PROXY}/private/pushed:1")
    identity = second.docker("image", "inspect", "--format={{.Id}}", "lab/app:1").stdout
    site.log_in(0)
    first.docker("pull", "private/pushed:1")
    assert first.docker("image", "inspect", "--format={{.Id}}", "private/pushed:1").stdout == identity


def test_docker_pulls_by_the_name_at_the_proxy(site: Site) -> None:
    """With a token for that name, which is of no use at the registry; nobody needs one for what everybody may read."""
    site.engines[1].docker("pull", f"{PROXY}/docker.io/lab/named:1")
    assert site.copies("lab/named", 1.0) == 1.0


@contextlib.contextmanager
def podman_on(site: Site, name: str, port: int = 7072) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Give podman on the second node, by the lines of the README for docker.io, and the same for other.example."""
    lines = next(block for block in re.findall(r"```\n(.*?)```", README, re.DOTALL) if "[[registry.mirror]]" in block)
    root = site.lab.root / name
    root.mkdir()
    lines = lines.replace(PROXY, f"127.0.0.1:{port}")
    (root / "registries.conf").write_text(f"{lines}\n{lines.replace('docker.io', 'other.example')}")
    (root / "auth.json").write_text("{}")
    host = site.proxies[1].host
    assert host is not None
    environment = {"SSL_CERT_FILE": site.hub.authority.file, "REGISTRY_AUTH_FILE": str(root / "auth.json"),
                   "CONTAINERS_REGISTRIES_CONF": str(root / "registries.conf")}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pod-") as short:  # podman refuses a runroot of more than 50 characters
        def podman(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
            fixed = ("podman", "--root", root / "root", "--runroot", short, "--tmpdir", root / "tmp",
                     "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none")  # fmt: skip
            done = subprocess.run([*host.prefix, *map(str, fixed), *command], capture_output=True, text=True,
                                  check=False, env={**site.lab.environment, **environment})  # fmt: skip
            assert done.returncode == 0 or not check, done.stderr
            return done

        yield podman


@pytest.mark.programs("podman")
def test_podman_pulls_by_the_lines_of_the_readme_what_wants_a_token(site: Site) -> None:
    with podman_on(site, "podman") as podman:
        sent = site.served(1)
        podman("pull", "docker.io/lab/app:1")
        assert site.served(1) > sent, "not past the proxy"
        assert podman("pull", "docker.io/private/app:1", check=False).returncode != 0, "nobody has logged in"
        podman("login", "--tls-verify=false", "-u", USER, "-p", PASSWORD, PROXY)
        podman("pull", "docker.io/private/app:1")  # with nothing to show at Docker Hub itself


@pytest.mark.programs("podman")
def test_a_password_for_one_registry_is_not_shown_at_the_token_server_of_another(site: Site) -> None:
    host, superpeer = site.proxies[1].host, site.superpeer.host
    assert host is not None
    assert superpeer is not None
    text = f'listen = "127.0.0.1:7073"\nsuperpeers = ["http://{superpeer.address}:7070"]\n[front]\nlogin = true\n'
    proxy = daemon(site.lab, host, "registry_proxy", 7073, text, name="login")
    try:
        with podman_on(site, "login-podman", 7073) as podman:
            podman("pull", "docker.io/lab/app:1")
            assert podman("pull", "docker.io/private/app:1", check=False).returncode != 0, "nobody has logged in"
            site.hub.tokens.shown.clear()
            behind = "127.0.0.1:7073/other.example"
            podman("login", "--tls-verify=false", "-u", USER, "-p", "for other.example", behind)
            assert podman("pull", "other.example/some/app:1", check=False).returncode != 0, "there is none"
            assert site.hub.tokens.shown == [], "nobody has asked there for anything"
            podman("login", "--tls-verify=false", "-u", USER, "-p", PASSWORD, "127.0.0.1:7073/docker.io")
            sent = json.loads(host.get("127.0.0.1", 7073, "/v1/status")[1])["served"]["bytes"]
            podman("pull", "docker.io/private/app:1")
            assert json.loads(host.get("127.0.0.1", 7073, "/v1/status")[1])["served"]["bytes"] > sent
    finally:
        proxy.stop()


def test_docker_goes_to_docker_hub_by_itself_when_the_proxy_cannot_answer_or_is_down(site: Site) -> None:
    engine = site.engines[0]
    refused = site.status(0)["requests"]["refused"]
    site.superpeer.kill()
    engine.docker("pull", "lab/refused:1")
    assert site.status(0)["requests"]["refused"] > refused, "it was asked, and said that it cannot"
    site.proxies[0].stop()
    engine.docker("pull", "lab/down:1")
    assert [site.copies(name, 1.0) for name in ("lab/refused", "lab/down")] == [1.0, 1.0]
