"""Time to a program's first line and bytes fetched for it: lazy against full pull and unpack.

The Debian image, from Debian's docker-registry. Hosts are network namespaces; each link, the registry's, the
superpeer's and the node's, is shaped by tbf. "first sight": the superpeer has never seen the image, streams it from
the registry and indexes it. "warm": it knows it; the node does not. The baseline is `ctr images pull` with the
overlayfs snapshotter, then the same program in the unpacked image. Every round has fresh nodes, containerd and
superpeer.
"""

from __future__ import annotations

from bench.harness import Bench, Row
from tests.lab import images, starts
from tests.lab.cleanup import Lab
from tests.lab.containerd import Containerd
from tests.lab.network import Network
from tests.lab.oci_layout import Image
from tests.lab.processes import Node, Registry, Superpeer
from tests.lab.starts import Start

_RATES = (("100mbit", "100 Mbit/s", 5.0), ("1gbit", "1 Gbit/s", None))
_KINDS = ("first sight", "warm")


def run(bench: Bench) -> None:
    """Measure at each rate."""
    bench.ours, bench.theirs = "lazy", "pull and unpack"
    image = images.debian_python(report=bench.say)
    rounds = 1 if bench.quick else 3
    for rate, words, target in _RATES:
        lazy: dict[str, list[Start]] = {kind: [] for kind in _KINDS}
        ordinary: list[Start] = []
        for number in range(rounds):
            bench.say(f"{words}, round {number + 1} of {rounds}")
            with Lab("bench") as lab:
                _round(lab, image, rate, lazy, ordinary)
        for kind in _KINDS:
            bench.add(Row(
                f"{words}, {kind}: first line", "s", [s.first_line for s in lazy[kind]],
                [s.first_line for s in ordinary], better="less", target=target if kind == "warm" else None,
            ))  # fmt: skip
        bench.add(Row(f"{words}, warm: mounted", "s", [s.ready for s in lazy["warm"]],
                      [s.ready for s in ordinary], better="less"))  # fmt: skip
        bench.add(Row(f"{words}, warm: bytes at the first line", "MB", [s.on_link / 1e6 for s in lazy["warm"]],
                      [s.on_link / 1e6 for s in ordinary], better="less"))  # fmt: skip
    bench.note(f"The image: {len(image.layers)} layers, {image.compressed_size / 1e6:.0f} MB compressed, "
               f"{image.unpacked_size / 1e6:.0f} MB in {image.files:,} files unpacked.")  # fmt: skip
    bench.note("Bytes are counted at the interface, with all headers.")


def _round(lab: Lab, image: Image, rate: str, lazy: dict[str, list[Start]], ordinary: list[Start]) -> None:
    network = Network(lab)
    host = network.host("registry", rate)
    registry = Registry(lab, host)
    reference = f"{registry.address}/bench/python:latest"
    image.push(reference, prefix=host.prefix)
    containerd = Containerd(lab, network.host("plain", rate))
    ordinary.append(starts.ordinarily(containerd, image, reference, lab.root / "plain"))
    containerd.stop()
    superpeer = Superpeer(lab, network.host("superpeer", rate), [registry.address])
    for kind, name in zip(_KINDS, ("first", "second"), strict=True):
        node = Node(lab, network.host(name, rate), [superpeer.url], name=name)
        directory = lab.root / f"{name}-image"
        lazy[kind].append(starts.lazily(node, image, reference, directory))
        node.dadi("umount", str(directory))
        node.stop()
