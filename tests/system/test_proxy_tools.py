"""Engines pull through the proxy, as they are in Debian: skopeo, podman, containerd; and go past it when it is down."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.containerd import Containerd
from tests.lab.network import Host, Network
from tests.lab.oci_layout import Image
from tests.lab.processes import REPOSITORY, Superpeer
from tests.lab.proxies import ProxyProcess
from tests.lab.registry import HTPASSWD, PASSWORD, USER, DockerRegistry
from tests.lab.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.programs("docker-registry", "skopeo", "ip"), pytest.mark.timeout(300)]

PORT = 5000
CROWD = int(os.environ.get("DADI_CROWD_IMAGE_MIB", "16")) << 20
"""Bytes of the image that twenty clients pull at once. The 200 MB of a real one take long where tests share two cores:
DADI_CROWD_IMAGE_MIB=200 does it."""


@dataclass
class Site:
    """A registry, a superpeer and a proxy, each on a host of its own, and a host for clients."""

    lab: Lab
    network: Network
    registry: DockerRegistry
    superpeer: Superpeer
    proxy: ProxyProcess
    client: Host
    image: Image

    @property
    def reference(self) -> str:
        return f"{self.registry.host}/lab/app:1"

    def push(self, image: Image, name: str, *options: str) -> str:
        image.push(f"{self.registry.host}/{name}", prefix=self.client.prefix, options=options)
        return f"{self.registry.host}/{name}"

    def run(self, *command: str | Path, **environment: str) -> str:
        done = subprocess.run(
            [*self.client.prefix, *map(str, command)], capture_output=True, text=True, check=False,
            env={**self.lab.environment, "PYTHONPATH": str(REPOSITORY), **environment},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def copies(self, image: Image) -> float:
        """Return how often the registry has sent the layers of an image."""
        digests = {layer.blob.digest: layer.blob.size for layer in image.layers}
        sent = sum(
            request.size for request in self.registry.access_log()
            if request.method == "GET" and request.path.rpartition("/")[2].partition("?")[0] in digests
        )  # fmt: skip
        return sent / sum(digests.values())


def registry_on(lab: Lab, host: Host, name: str, htpasswd: str | None = None) -> DockerRegistry:
    (lab.root / name).mkdir()
    registry = DockerRegistry(lab.root / name, PORT, htpasswd, address=host.address, prefix=host.prefix,
                              environment=lab.environment)  # fmt: skip
    registry.start()
    return registry


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Lab("proxy", tmp_path_factory.mktemp("lab")) as lab:
        network = Network(lab, "10.236.0")
        registry = registry_on(lab, network.host("registry"), "registry")
        superpeer = Superpeer(lab, network.host("superpeer"), [registry.host])
        client = network.host("client")
        proxy = ProxyProcess(lab, client, registry.host, [superpeer.url])
        image = images.synthetic(lab.root / "image", layers=3, size=2 << 20, seed=1)
        site = Site(lab, network, registry, superpeer, proxy, client, image)
        site.push(image, "lab/app:1")
        try:
            yield site
        finally:
            registry.stop()


def fresh(site: Site, seed: int, size: int = 1 << 20) -> tuple[Image, str]:
    """Push an image that nobody has seen."""
    image = images.synthetic(site.lab.root / f"image-{seed}", layers=2, size=size, seed=seed)
    return image, site.push(image, f"lab/fresh-{seed}:1")


def hosts_dir(site: Site, registry: DockerRegistry, proxy: str, name: str) -> Path:
    directory = site.lab.root / name
    site.run(sys.executable, "-m", "dadi.cli", "containerd-config", "--mirror", "--proxy", f"http://{proxy}",
             "--registry", f"http://{registry.host}", "--write", directory)  # fmt: skip
    return directory


def test_skopeo_copies_an_image_through_the_proxy(site: Site) -> None:
    copy = site.lab.root / "copy"
    site.run("skopeo", "--insecure-policy", "copy", "--src-tls-verify=false",
             f"docker://{site.proxy.address}/lab/app:1", f"dir:{copy}")  # fmt: skip
    for layer in site.image.layers:
        data = (copy / layer.blob.digest.removeprefix("sha256:")).read_bytes()
        assert "sha256:" + hashlib.sha256(data).hexdigest() == layer.blob.digest
    assert site.copies(site.image) == 1.0


def test_skopeo_inspects_and_lists_tags_through_the_proxy(site: Site) -> None:
    said = json.loads(site.run("skopeo", "list-tags", "--tls-verify=false", f"docker://{site.proxy.address}/lab/app"))
    assert said["Tags"] == ["1"]
    raw = site.run("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{site.proxy.address}/lab/app:1")
    assert len(json.loads(raw)["layers"]) == 3


@pytest.mark.programs("podman")
@pytest.mark.parametrize(("seed", "behind"), [(2, False), (8, True)])
def test_podman_pulls_through_its_configured_mirror(site: Site, seed: int, behind: bool) -> None:
    """As the proxy's upstream; and behind the mirror's address, where no name of podman's may have the port's colon."""
    image, reference = fresh(site, seed)
    location = f"{site.proxy.address}/{site.registry.host.replace(':', '_')}" if behind else site.proxy.address
    before = site.proxy.status()["served"]["requests"]
    conf = site.lab.root / "registries.conf"
    conf.write_text(
        f'[[registry]]\nlocation = "{site.registry.host}"\ninsecure = true\n'
        f'[[registry.mirror]]\nlocation = "{location}"\ninsecure = true\n'
    )
    root = site.lab.root / f"podman-{seed}"
    with tempfile.TemporaryDirectory(prefix="pod-") as short:  # podman refuses a runroot of more than 50 characters
        podman = ["podman", "--root", root / "root", "--runroot", short, "--tmpdir", root / "tmp",
                  "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none"]  # fmt: skip
        site.run(*podman, "pull", reference, CONTAINERS_REGISTRIES_CONF=str(conf))
        said = json.loads(site.run(*podman, "image", "inspect", reference))
    assert said[0]["RootFS"]["Layers"] == [layer.diff_id for layer in image.layers]
    assert site.proxy.status()["served"]["requests"] - before >= 3
    assert site.copies(image) == 1.0


@pytest.mark.programs("containerd", "ctr")
def test_containerd_pulls_through_the_mirror_that_we_configure(site: Site) -> None:
    image, reference = fresh(site, 3)
    directory = hosts_dir(site, site.registry, site.proxy.address, "certs-a")
    before = site.proxy.status()["served"]["requests"]
    containerd = Containerd(site.lab, site.client, "containerd-a")
    try:
        containerd.ctr("images", "pull", "--hosts-dir", str(directory), reference)
        assert image.tag
        assert reference in containerd.ctr("images", "ls", "--quiet").stdout
    finally:
        containerd.stop()
    assert site.proxy.status()["served"]["requests"] - before >= 3
    assert site.copies(image) == 1.0


@pytest.mark.programs("containerd", "ctr")
def test_containerd_goes_to_the_registry_by_itself_when_the_proxy_is_down(site: Site) -> None:
    image, reference = fresh(site, 4)
    directory = hosts_dir(site, site.registry, f"{site.client.address}:9", "certs-b")
    containerd = Containerd(site.lab, site.client, "containerd-b")
    try:
        containerd.ctr("images", "pull", "--hosts-dir", str(directory), reference)
    finally:
        containerd.stop()
    assert site.copies(image) == 1.0


@pytest.mark.programs("containerd", "ctr")
def test_containerd_goes_to_the_registry_by_itself_when_the_superpeer_is_down(site: Site) -> None:
    image, reference = fresh(site, 5)
    host = site.network.host("cut-off")
    proxy = ProxyProcess(site.lab, host, site.registry.host, [f"http://{site.client.address}:9"], name="cut-off")
    directory = hosts_dir(site, site.registry, proxy.address, "certs-c")
    containerd = Containerd(site.lab, site.client, "containerd-c")
    try:
        containerd.ctr("images", "pull", "--hosts-dir", str(directory), reference)
        assert proxy.status()["requests"]["refused"] >= 1, "the proxy was asked, and said that it cannot"
    finally:
        containerd.stop()
        proxy.stop()
    assert site.copies(image) == 1.0


@pytest.mark.programs("containerd", "ctr")
def test_containerd_waits_for_a_proxy_that_hangs_and_goes_on_as_soon_as_it_is_ended(site: Site) -> None:
    """As the watchdog of its unit ends it."""
    image, reference = fresh(site, 9)
    host = site.network.host("hangs")
    proxy = ProxyProcess(site.lab, host, site.registry.host, name="hangs")
    directory = hosts_dir(site, site.registry, proxy.address, "certs-hangs")
    containerd = Containerd(site.lab, site.client, "containerd-e")
    proxy.signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            pulled = pool.submit(containerd.ctr, "images", "pull", "--hosts-dir", str(directory), reference)
            wait_until(lambda: connected(host, 7072))
            assert not pulled.done()
            proxy.kill()
            pulled.result()
    finally:
        proxy.kill()
        containerd.stop()
    assert site.copies(image) == 1.0


@pytest.mark.programs("containerd", "ctr")
def test_containerd_takes_the_rest_from_the_registry_when_the_proxy_is_killed_in_the_middle(site: Site) -> None:
    image, reference = fresh(site, 10, 4 << 20)
    proxy = ProxyProcess(site.lab, site.network.host("killed"), site.registry.host, name="killed")
    directory = hosts_dir(site, site.registry, proxy.address, "certs-killed")
    containerd = Containerd(site.lab, site.client, "containerd-f")
    site.network.hosts["registry"].shape("20mbit")
    try:
        with ThreadPoolExecutor(1) as pool:
            pulled = pool.submit(containerd.ctr, "images", "pull", "--hosts-dir", str(directory), reference)
            wait_until(lambda: proxy.status()["originals"]["arriving"])
            proxy.kill()
            pulled.result()
        digests = containerd.ctr("content", "ls", "--quiet").stdout.split()
        assert {layer.blob.digest for layer in image.layers} <= {*digests}
    finally:
        site.network.hosts["registry"].shape(None)
        proxy.kill()
        containerd.stop()


def connected(host: Host, port: int) -> bool:
    """Whether somebody has a connection to a port of a host (/proc/net/tcp, its third column and its fourth)."""
    rows = host.inside(lambda: Path("/proc/thread-self/net/tcp").read_text()).splitlines()[1:]
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "01" for row in rows)


@pytest.mark.programs("containerd", "ctr")
def test_a_private_image_and_a_push_with_the_credentials_of_the_client_and_not_without(site: Site) -> None:
    host = site.network.host("private")
    registry = registry_on(site.lab, host, "private", HTPASSWD)
    proxy = ProxyProcess(site.lab, host, registry.host, name="proxy-private", front='uploads = "pass"\nlogin = true\n')
    containerd = Containerd(site.lab, site.client, "containerd-d")
    try:
        site.image.push(f"{registry.host}/lab/app:1", prefix=site.client.prefix,
                        options=["--dest-creds", f"{USER}:{PASSWORD}"])  # fmt: skip
        directory = hosts_dir(site, registry, proxy.address, "certs-d")
        pull = ("images", "pull", "--hosts-dir", str(directory))
        refused = containerd.ctr(*pull, f"{registry.host}/lab/app:1", check=False)
        assert refused.returncode != 0
        containerd.ctr(*pull, "--user", f"{USER}:{PASSWORD}", f"{registry.host}/lab/app:1")
        assert proxy.status()["served"]["requests"] >= 3
        path = f"/v2/lab/app/blobs/{site.image.layers[0].blob.digest}"
        assert site.client.get(host.address, 7072, path)[0] == 401, "cached, and still private"
        assert _status_with_password(site.client, proxy.address, path) == 200
        _push_through(site, proxy.address, registry)
    finally:
        containerd.stop()
        proxy.stop()
        registry.stop()


def _push_through(site: Site, address: str, registry: DockerRegistry) -> None:
    """Push with skopeo, of which uploads are passed on to the registry: without the password, with it; and pull."""
    image = images.synthetic(site.lab.root / "pushed", layers=2, size=1 << 20, seed=7)
    copy = ("skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", f"oci:{image.layout}:{image.tag}",
            f"docker://{address}/lab/pushed:1")  # fmt: skip
    refused = subprocess.run([*site.client.prefix, *copy, "--dest-no-creds"], capture_output=True, check=False)
    assert refused.returncode != 0
    site.run(*copy, "--dest-creds", f"{USER}:{PASSWORD}")
    raw = site.run("skopeo", "inspect", "--raw", "--tls-verify=false", "--creds", f"{USER}:{PASSWORD}",
                   f"docker://{registry.host}/lab/pushed:1")  # fmt: skip
    assert [layer["digest"] for layer in json.loads(raw)["layers"]] == [layer.blob.digest for layer in image.layers]
    site.run("skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--src-creds", f"{USER}:{PASSWORD}",
             f"docker://{address}/lab/pushed:1", f"dir:{site.lab.root / 'pulled'}")  # fmt: skip


def _status_with_password(client: Host, address: str, path: str) -> int:
    def act() -> int:
        connection = http.client.HTTPConnection(address, timeout=20)
        try:
            good = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            connection.request("GET", path, headers={"Authorization": f"Basic {good}"})
            return connection.getresponse().status
        finally:
            connection.close()

    return client.inside(act)


def test_twenty_clients_at_once_cost_the_registry_one_copy(site: Site) -> None:
    """On four nodes, through one superpeer; each client reads all layers and checks them."""
    image = images.synthetic(site.lab.root / "crowd", layers=4, files=8, size=CROWD // 4, compressible=0.0, seed=6)
    site.push(image, "lab/crowd:1")
    hosts = [site.network.host(f"crowd-{n}") for n in range(4)]
    proxies = [
        ProxyProcess(site.lab, host, site.registry.host, [site.superpeer.url], name=f"crowd-{n}")
        for n, host in enumerate(hosts)
    ]

    def pull(number: int) -> None:
        host = hosts[number % 4]
        for layer in image.layers:
            status, body = host.get(host.address, 7072, f"/v2/lab/crowd/blobs/{layer.blob.digest}", 120.0)
            assert status == 200
            assert "sha256:" + hashlib.sha256(body).hexdigest() == layer.blob.digest

    try:
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(pull, range(20)))
    finally:
        for proxy in proxies:
            proxy.stop()
    assert site.copies(image) == 1.0
