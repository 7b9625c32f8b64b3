"""Engines as they are in Debian pull through the proxy inside a `dadi-node`, by the lines of the README.

podman, containerd and skopeo, against docker-registry, with passwords and without; docker-registry itself as a mirror
of ours, which is Docker's own client library. Docker has a file of its own (`test_docker_mirror.py`); CRI-O, which is
of podman's libraries, is not there to be run.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dadi.containerd import mirror_check
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.containerd import Containerd
from tests.lab.cri import Cri
from tests.lab.network import Host, Network
from tests.lab.oci_layout import Image
from tests.lab.processes import REPOSITORY, Node, Superpeer, unix_get
from tests.lab.pulling import pull
from tests.lab.registry import HTPASSWD, PASSWORD, USER, DockerRegistry

pytestmark = [
    pytest.mark.root,
    pytest.mark.programs("docker-registry", "skopeo", "podman", "containerd", "ctr", "ip", "nsenter", "unshare"),
    pytest.mark.timeout(300),
]

PORT = 80  # podman's mirrors are names of images: with a port in their middle they are none
MIRROR = "127.0.0.1:7072"
README = (REPOSITORY / "README.md").read_text()


@dataclass
class Site:
    """Two registries, one of them with a password, a superpeer, and a node with its proxy where the engines are too."""

    lab: Lab
    network: Network
    open: DockerRegistry
    private: DockerRegistry
    superpeer: Superpeer
    node: Node
    containerd: Containerd
    short: Path
    """For podman, which refuses a runroot of more than 50 characters."""
    images: dict[int, Image] = field(default_factory=dict)

    @property
    def host(self) -> Host:
        assert self.node.host is not None
        return self.node.host

    def fresh(self, seed: int, registry: DockerRegistry | None = None, *options: str, size: int = 1 << 20) -> str:
        """Push an image that nobody has seen; return what an engine calls it."""
        image = images.synthetic(self.lab.root / f"image-{seed}", layers=2, size=size, compressible=0.2, seed=seed)
        reference = f"{name_of(registry or self.open)}/lab/fresh-{seed}:1"
        image.push(reference, prefix=self.host.prefix, options=options)
        self.images[seed] = image
        return reference

    def run(self, *command: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.host.prefix, *map(str, command)], capture_output=True, text=True, check=False,
            env={**self.lab.environment, "PYTHONPATH": str(REPOSITORY), **environment},
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}\n{self.node.tail()}"
        return done

    def podman(self, conf: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        root = self.lab.root / "podman"
        fixed = ["--root", root / "root", "--runroot", self.short, "--tmpdir", root / "tmp", "--storage-driver", "vfs",
                 "--cgroup-manager", "cgroupfs", "--events-backend", "none"]  # fmt: skip
        return self.run("podman", *fixed, *command, check=check, CONTAINERS_REGISTRIES_CONF=str(conf),
                        REGISTRY_AUTH_FILE=str(self.lab.root / "auth.json"))  # fmt: skip

    def hosts_dir(self, name: str, *registries: DockerRegistry) -> str:
        """Have `dadi containerd-config` write certs.d, as the README has it."""
        directory = self.lab.root / name
        own = [option for registry in registries for option in ("--registry", f"http://{name_of(registry)}")]
        self.node.dadi("containerd-config", "--mirror", *own, "--write", str(directory))
        return str(directory)

    def copies(self, seed: int, registry: DockerRegistry | None = None, *, at_least: float = 1.0) -> float:
        """Return how often a registry has sent the layers of an image; it writes its log when it has sent them."""
        sizes = {layer.blob.digest: layer.blob.size for layer in self.images[seed].layers}
        deadline = time.monotonic() + 5
        while True:
            found = sum(
                request.size for request in (registry or self.open).access_log()
                if request.method == "GET" and request.path.rpartition("/")[2].partition("?")[0] in sizes
            ) / sum(sizes.values())  # fmt: skip
            if found >= at_least or time.monotonic() > deadline:
                return found
            time.sleep(0.01)

    def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Ask the proxy."""

        def act() -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(MIRROR, timeout=20)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, dict(answer.headers), answer.read()
            finally:
                connection.close()

        return self.host.inside(act)


class Mirror(DockerRegistry):
    """docker-registry as a pull-through cache of the node's proxy: the distribution project's client, and Docker's."""

    def _configuration(self) -> dict[str, object]:
        return {**super()._configuration(), "proxy": {"remoteurl": f"http://{MIRROR}"}}


def name_of(registry: DockerRegistry) -> str:
    """Return the registry without the port that is HTTP's own."""
    return registry.host.removesuffix(f":{PORT}")


def registry_on(lab: Lab, host: Host, htpasswd: str | None = None) -> DockerRegistry:
    (lab.root / host.name).mkdir()
    return DockerRegistry(lab.root / host.name, PORT, htpasswd, address=host.address, prefix=host.prefix,
                          environment=lab.environment)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with (
        tempfile.TemporaryDirectory(prefix="pod-") as short,
        Lab("node-proxy", tmp_path_factory.mktemp("lab")) as lab,
    ):
        network = Network(lab, "10.237.0")
        with (
            registry_on(lab, network.host("open")) as free,
            registry_on(lab, network.host("private"), HTPASSWD) as private,
        ):
            allowed = [name_of(free), name_of(private)]
            at_once = (
                "retries = 1\nbackoff = 0.05\n"  # of [registry]
                "[indexing]\nrest_after = 3600\n[originals]\ntag_ttl = 0\naccess_ttl = 0\npatience = 0.5\n"
            )
            superpeer = Superpeer(lab, network.host("superpeer"), allowed, sections=at_once)
            sections = (
                f'[backfill]\nenabled = false\n[proxy]\nenabled = true\nlogin = true\nupstream = "{name_of(private)}"\n'
                f"[registry]\nallowed = {json.dumps(allowed)}\nplain_http = {json.dumps(allowed)}\n"
            )
            host = network.host("node")
            node = Node(lab, host, [superpeer.url], sections=sections)
            node.wait_until(lambda: host.get("127.0.0.1", 7072, "/healthz")[0] == 200)
            (lab.root / "auth.json").write_text("{}")
            containerd = Containerd(lab, host)
            yield Site(lab, network, free, private, superpeer, node, containerd, Path(short))


def registries_conf(site: Site, registry: DockerRegistry, *, otherwise: bool = False) -> Path:
    """Write the README's lines for podman, for a registry of ours; `otherwise`: it may be asked without TLS too."""
    lines = next(block for block in re.findall(r"```\n(.*?)```", README, re.DOTALL) if "[[registry.mirror]]" in block)
    assert lines.count("docker.io") == 2
    assert MIRROR in lines
    lines = lines.replace("docker.io", name_of(registry))
    if otherwise:
        lines = lines.replace("[[registry.mirror]]", "insecure = true\n[[registry.mirror]]")
    conf = site.lab.root / f"registries-{name_of(registry)}-{otherwise}.conf"
    conf.write_text(lines)
    return conf


# ---- as configured


def test_podman_pulls_by_the_lines_of_the_readme(site: Site) -> None:
    reference = site.fresh(1)
    conf = registries_conf(site, site.open)
    site.podman(conf, "pull", reference)
    said = json.loads(site.podman(conf, "image", "inspect", reference).stdout)
    assert said[0]["RootFS"]["Layers"] == [layer.diff_id for layer in site.images[1].layers]
    assert site.node.status()["proxy"]["served"]["requests"] >= 3
    assert site.copies(1) == 1.0


def test_podman_shows_the_mirror_what_it_was_given_for_the_mirror(site: Site) -> None:
    reference = site.fresh(2, site.private, "--dest-creds", f"{USER}:{PASSWORD}")
    conf = registries_conf(site, site.private)
    assert site.podman(conf, "pull", reference, check=False).returncode != 0, "nobody has logged in"
    behind = f"{MIRROR}/{name_of(site.private)}"
    site.podman(conf, "login", "--tls-verify=false", "-u", USER, "-p", PASSWORD, behind)
    try:
        site.podman(conf, "pull", reference)
    finally:
        site.podman(conf, "logout", behind)
    assert site.copies(2, site.private) == 1.0
    layer = site.images[2].layers[0].blob.digest
    assert site.get(f"/v2/{name_of(site.private)}/lab/fresh-2/blobs/{layer}")[0] == 401, "cached, and still private"
    assert PASSWORD not in site.node.log.read_text() + site.superpeer.log.read_text()


def test_containerd_pulls_by_the_default_file(site: Site) -> None:
    reference = site.fresh(3)
    site.containerd.ctr("images", "pull", "--hosts-dir", site.hosts_dir("certs-default"), reference)
    assert site.copies(3) == 1.0


def test_kubernetes_pulls_by_the_default_file_and_doctor_says_that_it_does(site: Site) -> None:
    """By CRI, which has to be told of certs.d."""
    reference = site.fresh(13)
    certs = site.hosts_dir("certs-cri", site.open)
    config = f'[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "{certs}"\n'
    served = site.node.status()["proxy"]["served"]["bytes"]
    containerd = Containerd(site.lab, site.host, "cri", config=config, cri=True)
    try:
        with Cri(containerd.socket) as client:
            client.pull(reference)
            assert client.image(reference) is not None
        rows = site.host.inside(lambda: mirror_check.probe(str(containerd.socket), certs, ""))
        assert [row.detail for row in rows] == [f"http://{MIRROR} answers", f"yes, by {certs}"]
        rows = site.host.inside(lambda: mirror_check.probe(str(containerd.socket), site.hosts_dir("certs-other"), ""))
        assert rows[1].detail.startswith("no: ")
    finally:
        containerd.stop()
    assert site.node.status()["proxy"]["served"]["bytes"] > served, "not past the proxy"
    assert site.copies(13) == 1.0


def test_containerd_pulls_a_private_image_with_the_passwords_of_the_pull(site: Site) -> None:
    reference = site.fresh(4, site.private, "--dest-creds", f"{USER}:{PASSWORD}")
    pulling = ("images", "pull", "--hosts-dir", site.hosts_dir("certs-private", site.private))
    assert site.containerd.ctr(*pulling, reference, check=False).returncode != 0
    served = site.node.status()["proxy"]["served"]["bytes"]
    site.containerd.ctr(*pulling, "--user", f"{USER}:{PASSWORD}", reference)
    assert site.node.status()["proxy"]["served"]["bytes"] > served, "not past the proxy"
    assert site.copies(4, site.private) == 1.0


def test_skopeo_copies_with_a_password_and_not_without(site: Site) -> None:
    reference = site.fresh(5, site.private, "--dest-creds", f"{USER}:{PASSWORD}")
    copy = ("skopeo", "--insecure-policy", "copy", "--src-tls-verify=false")
    source = f"docker://{MIRROR}/{reference}"
    assert site.run(*copy, "--src-no-creds", source, f"dir:{site.lab.root / 'refused'}", check=False).returncode != 0
    site.run(*copy, "--src-creds", f"{USER}:{PASSWORD}", source, f"dir:{site.lab.root / 'copied'}")
    assert site.copies(5, site.private) == 1.0


def test_dockers_client_library_pulls_through_us(site: Site) -> None:
    """docker-registry as a mirror of our mirror. (It knows no passwords but those of token servers.)"""
    name = site.fresh(6).partition(":")[0]
    directory = site.lab.root / "mirror"
    directory.mkdir()
    with Mirror(directory, 5001, address="127.0.0.1", prefix=site.host.prefix,
                environment=site.lab.environment) as mirror:  # fmt: skip
        found = site.host.inside(lambda: pull("127.0.0.1", 5001, name, "1", mirror.host))
    assert found.errors == []
    assert {layer.blob.digest for layer in site.images[6].layers} <= found.blobs.keys()
    assert site.copies(6) == 1.0


# ---- lazy and plain


def test_a_lazy_image_and_a_plain_pull_of_it_cost_one_copy(site: Site) -> None:
    """Seek points have brought parts of the compressed layers already: the rest is fetched, and only that."""
    reference = site.fresh(7, size=3 << 20)
    site.run(sys.executable, "-m", "dadi.cli", "index", reference, "--plain-http")
    before = site.copies(7, at_least=0)
    directory = site.lab.root / "lazy"
    directory.mkdir()
    site.node.dadi("mount", reference, str(directory))
    try:
        largest = max((path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()),
                      key=lambda path: path.stat().st_size)  # fmt: skip
        with largest.open("rb") as file:
            assert os.pread(file.fileno(), 1 << 16, 0)
        part = site.copies(7, at_least=before + 0.01) - before
        assert 0 < part < 1
        site.podman(registries_conf(site, site.open), "pull", reference)
        assert site.copies(7, at_least=before + 0.999) - before == pytest.approx(1.0, abs=0.01)
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.read_bytes()
    finally:
        site.node.dadi("umount", str(directory))
    assert site.copies(7, at_least=before + 0.999) - before == pytest.approx(1.0, abs=0.01), "there was no rest"


# ---- pushes


def test_a_push_is_refused_with_its_reason(site: Site) -> None:
    image = site.images[1]
    done = site.run("skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", f"oci:{image.layout}:{image.tag}",
                    f"docker://{MIRROR}/{name_of(site.open)}/lab/pushed:1", check=False)  # fmt: skip
    assert done.returncode != 0
    assert "push to the registry itself" in done.stderr


# ---- half there, and away


def test_what_is_here_is_served_while_the_registry_is_away_and_said_so(site: Site) -> None:
    reference = site.fresh(8)
    conf = registries_conf(site, site.open)
    site.podman(conf, "pull", reference)
    site.podman(conf, "rmi", reference)
    site.open.stop()
    try:
        site.podman(conf, "pull", reference)
        status, headers, _ = site.get(f"/v2/{name_of(site.open)}/lab/fresh-8/manifests/1")
        assert status == 200
        assert headers["Warning"].startswith("299 - ")
        assert int(headers["Age"]) >= 0
        assert site.get(f"/v2/{name_of(site.open)}/lab/fresh-8/manifests/2")[0] == 503
    finally:
        site.open.start()
    assert site.node.status()["proxy"]["requests"]["stale"] >= 2
    away = "registry away, answered from the cache"
    assert away in {event.get("kind") for event in site.superpeer.events()}, "in its log"
    assert away in {row["kind"] for row in site.superpeer.status()["fallbacks"]}
    assert "dadi_node_proxy_requests_stale" in unix_get(site.node.socket, "/metrics")[1].decode()


def test_engines_go_to_the_registry_by_themselves_without_superpeer_and_without_node(site: Site) -> None:
    conf = registries_conf(site, site.open, otherwise=True)
    pulling = ("images", "pull", "--hosts-dir", site.hosts_dir("certs-otherwise", site.open))
    site.superpeer.kill()
    refused = site.node.status()["proxy"]["requests"]["refused"]
    first, second = site.fresh(9), site.fresh(10)
    site.podman(conf, "pull", first)
    site.containerd.ctr(*pulling, second)
    assert site.node.status()["proxy"]["requests"]["refused"] > refused, "it was asked, and said that it cannot"
    site.node.stop()
    first, second = site.fresh(11), site.fresh(12)
    site.podman(conf, "pull", first)
    site.containerd.ctr(*pulling, second)
    assert [site.copies(seed) for seed in (9, 10, 11, 12)] == [1.0] * 4
