"""Containers by containerd and runc: time from the pull to a server's first answer, dadi against overlayfs.

Three images on Debian: an interpreter that imports 55 modules, a web server that answers its first request, a database
that answers its first query. Each from Debian's docker-registry, by the same containerd, once with overlayfs
(`ctr image pull`, `ctr run`), once with dadi (`dadi pull`, `ctr run --snapshotter dadi`); links are shaped by tbf. The
superpeer knows the images, as after their first start anywhere; node and containerd are new in every round.

Then twenty containers of the interpreter's image at once, all bytes local, caches warm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from bench.harness import Bench, Row, alternately
from tests.lab import images, server_images
from tests.lab.cleanup import Lab
from tests.lab.containerd import Containerd
from tests.lab.network import Host, Network
from tests.lab.oci_layout import Image
from tests.lab.processes import LabFailed, Node, Registry, Superpeer

_RATES = (("100mbit", "100 Mbit/s"), ("1gbit", "1 Gbit/s"))
_IMAGES: tuple[tuple[str, Callable[..., Image]], ...] = (
    ("interpreter", images.debian_python), ("web server", server_images.web_server),
    ("database", server_images.database),
)  # fmt: skip
_AT_ONCE = 20
_NODE = "node"


@dataclass(frozen=True)
class Ready:
    """Seconds from asking for the image to the program's first line, and bytes on the host's link until then."""

    seconds: float
    received: int


def run(bench: Bench) -> None:
    """Measure the three images at each rate, then twenty at once."""
    bench.ours, bench.theirs = "dadi", "overlayfs"
    made = {name: make(report=bench.say) for name, make in _IMAGES}
    rounds = 1 if bench.quick else 3
    for rate, words in _RATES:
        lazy: dict[str, list[Ready]] = {name: [] for name in made}
        plain: dict[str, list[Ready]] = {name: [] for name in made}
        for number in range(rounds):
            bench.say(f"{words}, round {number + 1} of {rounds}")
            with Lab("bench") as lab:
                _round(lab, made, rate, lazy, plain)
        for name in made:
            bench.add(Row(f"{words}: {name} ready", "s", [r.seconds for r in lazy[name]],
                          [r.seconds for r in plain[name]], better="less"))  # fmt: skip
            bench.add(Row(f"{words}: {name}, bytes fetched by then", "MB", [r.received / 1e6 for r in lazy[name]],
                          [r.received / 1e6 for r in plain[name]], better="less"))  # fmt: skip
    with Lab("bench") as lab:
        _at_once(bench, lab, made["interpreter"], 3 if bench.quick else 9)
    for name, image in made.items():
        bench.note(f"{name}: {len(image.layers)} layers, {image.compressed_size / 1e6:.0f} MB compressed, "
                   f"{image.unpacked_size / 1e6:.0f} MB in {image.files:,} files unpacked.")  # fmt: skip
    bench.note("Bytes are counted at the interface, with all headers. Backfill has not begun by then, or counts too.")


def _round(lab: Lab, made: dict[str, Image], rate: str, lazy: dict[str, list[Ready]],
           plain: dict[str, list[Ready]]) -> None:  # fmt: skip
    network = Network(lab)
    registry_host = network.host("registry")
    registry = Registry(lab, registry_host)
    superpeer = Superpeer(lab, network.host("superpeer"), [registry.address])
    references = {name: f"{registry.address}/bench/{name.replace(' ', '-')}:latest" for name in made}
    for name, image in made.items():
        image.push(references[name], prefix=registry_host.prefix)
    _teach(lab, network.host("teacher"), superpeer, list(references.values()))
    for each in (registry_host, network.hosts["superpeer"]):
        each.shape(rate)
    host = network.host("machine", rate)
    node = Node(lab, host, [superpeer.url], name=_NODE)
    containerd = Containerd(lab, host, snapshotter=node.socket.parent / "snapshotter.sock")
    for name, image in made.items():
        plain[name].append(_ready(containerd, host, image, references[name], "overlayfs"))
        # what ctr has pulled would spare dadi its manifest and config
        containerd.ctr("image", "rm", "--sync", references[name])
        lazy[name].append(_ready(containerd, host, image, references[name], "dadi"))
        containerd.ctr("image", "rm", "--sync", references[name])


def _teach(lab: Lab, host: Host, superpeer: Superpeer, references: Sequence[str]) -> None:
    """Have the superpeer index the images, by a node that mounts them once."""
    node = Node(lab, host, [superpeer.url], name="teacher", options="unmount_on_stop = true")
    for number, reference in enumerate(references):
        directory = lab.root / f"taught-{number}"
        directory.mkdir()
        node.dadi("mount", reference, str(directory))
        node.dadi("umount", str(directory))
    node.stop()


def _pull(containerd: Containerd, reference: str, snapshotter: str) -> None:
    if snapshotter == "overlayfs":
        containerd.pull(reference)
    else:
        containerd.pull_lazily(reference)


def _ready(containerd: Containerd, host: Host, image: Image, reference: str, snapshotter: str) -> Ready:
    before, start = host.traffic(), time.monotonic()
    _pull(containerd, reference, snapshotter)
    with containerd.running(reference, f"{snapshotter}-{start}", image.command, snapshotter) as line:
        seconds = time.monotonic() - start
        received = (host.traffic() - before).received
    _check(image, line)
    return Ready(seconds, received)


def _at_once(bench: Bench, lab: Lab, image: Image, rounds: int) -> None:
    """Twenty containers of one image at once: until the last has said its line."""
    network = Network(lab)
    host = network.host("machine")
    registry = Registry(lab, host)
    reference = f"{registry.address}/bench/image:latest"
    image.push(reference, prefix=host.prefix)
    superpeer = Superpeer(lab, host, [registry.address])
    sections = "[backfill]\nquiet = 0\n[snapshotter]\nkeep_idle = 3600"
    node = Node(lab, host, [superpeer.url], name=_NODE, sections=sections)
    containerd = Containerd(lab, host, snapshotter=node.socket.parent / "snapshotter.sock")
    for snapshotter in ("overlayfs", "dadi"):
        _pull(containerd, reference, snapshotter)
        _check(image, containerd.run(reference, f"first-{snapshotter}", image.command, snapshotter).strip())
    node.wait_until(lambda: [mount["state"] for mount in node.status()["mounts"]] == ["local"], timeout=300)

    def start(snapshotter: str) -> float:
        begun = time.monotonic()
        with ExitStack() as stack:
            names = [f"{snapshotter}-{begun}-{number}" for number in range(_AT_ONCE)]
            contexts = [containerd.running(reference, name, image.command, snapshotter) for name in names]
            # all of them are started before the first line is waited for
            for context in contexts:
                context.start()
            lines = [stack.enter_context(context) for context in contexts]
            seconds = time.monotonic() - begun
        for line in lines:
            _check(image, line)
        return seconds

    bench.say(f"{_AT_ONCE} containers at once, {rounds} rounds")
    start("overlayfs"), start("dadi")
    theirs, ours = alternately(rounds, lambda: start("overlayfs"), lambda: start("dadi"))
    bench.add(Row(f"{_AT_ONCE} containers at once, all local and warm: the last is ready", "s", ours, theirs,
                  better="less", target=1.0))  # fmt: skip


def _check(image: Image, line: str) -> None:
    if line != image.facts["first_line"]:
        raise LabFailed(f"the container said {line!r} instead of {image.facts['first_line']!r}")
