"""Proxies that engines pull through, of all kinds, on a scene's superpeers; and what leaves the registry meanwhile.

What lives here: the doors of the nodes' own proxies, of one alone with superpeers and of one with none; images that
nobody has asked for yet; copies. What never does: harm (pulls.py, pulls_registry.py).

    nodes     in `dadi-node`: chunks from other nodes, then superpeers
    through   `dadi-registry-proxy` with superpeers
    alone     `dadi-registry-proxy` without: straight from the registry, into a store of its own
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

from aiohttp import web

from tests.faults import door
from tests.faults.engines import Door, Engines, PulledImage, image_at
from tests.faults.frame import Run
from tests.faults.scene import Daemon, Node, Scene, Setting, free_ports

_ORIGINALS = "[originals]\ntag_ttl = 0.2\naccess_ttl = 0.2\npatience = 0.5\n"
"""So that what is here already is asked about again while the registry is ill."""
REGISTRY = f"retries = 5\nbackoff = 0.1\nmax_backoff = 1\nread_timeout = 2\nconnect_timeout = 2\n{_ORIGINALS}"
FLEET = Setting(nodes=2, superpeers=2, peers=True, mounted=False, layers=1, size=1 << 20,
                node_sections='[proxy]\nenabled = true\nlisten = "127.0.0.1:0"\n',
                superpeer_sections=f"{REGISTRY}[peers]\nroot_slots = 1\nheartbeat = 1\nexpiry = 3\n")  # fmt: skip
_LAYERS, _SIZE = 2, 700_000
"""Of an image: layers that nodes give each other, being larger than `originals.messages.SMALL`."""


class ProxyDaemon(Daemon):
    """`dadi-registry-proxy`, at the same port each time that it is started."""

    program = "registry_proxy.main"

    def __init__(self, scene: Scene, name: str, port: int, urls: Sequence[str]) -> None:
        super().__init__(scene, name)
        self.address, self.state = f"127.0.0.1:{port}", self.directory / "state"
        hosts = json.dumps([scene.supply.door.host])
        self.config.write_text(
            f'listen = "{self.address}"\nstate = "{self.state}"\nlog_json = true\n'
            f"superpeers = {json.dumps(list(urls))}\n[registry]\nallowed = {hosts}\nplain_http = {hosts}\n{REGISTRY}\n"
        )

    def answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=1):
            return True


class Paced(door.Fault):
    """Bodies of blobs come at so many bytes a second: so that there is a middle."""

    def __init__(self, rate: int) -> None:
        self._rate = rate

    async def body(self, there: door.Door, request: web.Request, answer: web.StreamResponse, data: bytes) -> None:
        piece = self._rate // 20
        for at in range(0, len(data), piece):
            await answer.write(data[at : at + piece])
            await asyncio.sleep(0.05)


class Fleet:
    """See the head of this file; a context manager. `through` and `alone` stay for the scene's next cases."""

    def __init__(self, run: Run) -> None:
        self.run, self.scene = run, run.scene
        if not run.scene.others:
            first, second = free_ports(2)
            started = [ProxyDaemon(run.scene, "through", first, run.scene.urls),
                       ProxyDaemon(run.scene, "alone", second, ())]  # fmt: skip
            for proxy in started:
                proxy.begin()
            for proxy in started:
                proxy.wait()
            run.scene.others += started
        self.through, self.alone = (proxy for proxy in run.scene.others if isinstance(proxy, ProxyDaemon))
        self._doors: dict[str, str] = {}
        self._made = 0
        self._all: list[Engines] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for engines in self._all:
            engines.stop()

    # ---- who is asked

    def node(self, node: Node) -> Door:
        """Return the door of a node's own proxy."""
        return partial(self._of_node, node)

    def _of_node(self, node: Node) -> str:
        pid = str(node.process.popen.pid) if node.process else ""
        if pid not in self._doors:
            self._doors[pid] = node.status()["proxy"]["address"]
        return self._doors[pid]

    @property
    def behind(self) -> list[Door]:
        """The doors of all that get everything from superpeers."""
        return [*(self.node(node) for node in self.scene.nodes), lambda: self.through.address]

    @property
    def doors(self) -> list[Door]:
        return [*self.behind, lambda: self.alone.address]

    # ---- what for

    def images(self, count: int = 1, *, layers: int = _LAYERS, size: int = _SIZE) -> list[PulledImage]:
        """Return images that nobody has asked for."""
        found = []
        for _ in range(count):
            self._made += 1
            content = self.scene.supply.image(f"{self.run.case.name}-{self._made}", layers=layers, size=size)
            found.append(image_at(self.scene.supply.registry, content.reference))
        return found

    def warm(self, doors: Sequence[Door], count: int = 1) -> list[PulledImage]:
        """Return images that all these have given already."""
        images = self.images(count)
        with self.engines(doors, images, engines=1, once=True) as engines:
            self.have(engines)
        return images

    @contextlib.contextmanager
    def engines(self, doors: Sequence[Door], images: Sequence[PulledImage], *, engines: int = 2, once: bool = False
                ) -> Iterator[Engines]:  # fmt: skip
        """Have images pulled."""
        made = Engines(doors, images, engines=engines, once=once)
        self._all.append(made)
        self.run.count(made)
        with made:
            yield made

    def have(self, engines: Engines, limit: float = 60.0) -> None:
        """Wait until each of some engines has had each of its images."""
        self.run.wait_for(lambda: engines.have_all, limit, "all have pulled all images")

    # ---- what came of it

    def copies(self, images: Sequence[PulledImage]) -> float:
        """Return how often the blobs of images have left the registry, on the whole."""
        digests = {digest for image in images for digest, _ in image.blobs}
        sent = sum(
            request.size for request in self.scene.supply.registry.access_log()
            if request.method == "GET" and request.status < 300 and request.path.rpartition("/")[2] in digests
        )  # fmt: skip
        return sent / sum(image.size for image in images)

    def say(self, images: Sequence[PulledImage], proxies: int = 1) -> None:
        """Have the row tell what failed, and how often images came from the registry for each of so many stores."""
        reasons = sum((engines.reasons for engines in self._all), start=type(Engines([], []).reasons)())
        slowest = max(engines.longest_failure for engines in self._all)
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        self.run.note = f"{self.copies(images) / proxies:.2f} copies" + (
            f"; failed: {told}, after {slowest:.1f} s at most" if told else ""
        )
        assert not any("WITHOUT" in reason for reason in reasons), "an error that does not say what to do"


def coming(state: Path) -> int:
    """Return the bytes of whole blobs that are on their way into a store."""
    total = 0
    for file in (state / "store" / "incoming").glob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total
