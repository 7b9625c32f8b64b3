"""The very first node, with an empty superpeer: with an index made at build time, without, and by a full pull.

The Debian image, all layers gzip, from Debian's docker-registry. Hosts are network namespaces; each link, the
registry's, the superpeer's and the node's, is shaped by tbf. "indexed": `dadi index` has put the index beside the
image; "converted": `dadi convert` has made a zstd image of it; "first sight": neither, the superpeer streams and
indexes whole layers first. The baseline is `ctr images pull` with the overlayfs snapshotter, then the same program in
the unpacked image. Every round has a fresh superpeer, node and containerd; bytes from the registry are counted at the
superpeer's interface until the program has ended, with all headers and what its node asked for.
"""

from __future__ import annotations

import json
import os
from typing import Any

from bench.harness import Bench, Row
from tests.lab import images, starts
from tests.lab.cleanup import Lab
from tests.lab.containerd import Containerd
from tests.lab.network import Host, Network
from tests.lab.oci_layout import Image
from tests.lab.processes import Node, Registry, Superpeer, dadi

_RATES = (("100mbit", "100 Mbit/s", 4.0), ("1gbit", "1 Gbit/s", None))
_KINDS = ("indexed", "converted", "first sight")
_SHARE = 0.20
"""Of the image's bytes may have left the registry when the first line is there."""


def run(bench: Bench) -> None:
    """Measure at each rate, then say what the indexes cost."""
    bench.ours, bench.theirs = "lazy", "pull and unpack"
    image = images.debian_python(report=bench.say, zstd=False)
    costs: list[dict[str, Any]] = []
    for rate, words, target in _RATES:
        starts_of: dict[str, list[starts.Start]] = {kind: [] for kind in _KINDS}
        left: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        ordinary: list[starts.Start] = []
        for number in range(1 if bench.quick else 3):
            bench.say(f"{words}, round {number + 1}")
            with Lab("bench") as lab:
                costs.append(_round(lab, image, rate, starts_of, left, ordinary))
        for kind in _KINDS:
            bench.add(Row(
                f"{words}, {kind}: first line", "s", [start.first_line for start in starts_of[kind]],
                [start.first_line for start in ordinary], better="less", target=target if kind == "indexed" else None,
            ))  # fmt: skip
        for kind in _KINDS:
            bench.add(Row(
                f"{words}, {kind}: share of the image that has left the registry", "", left[kind],
                limit=_SHARE if kind == "indexed" else None,
            ))  # fmt: skip
    cost = costs[-1]
    unpacked, compressed = image.unpacked_size / (1 << 30), image.compressed_size / (1 << 30)
    bench.add(Row("`dadi index`: CPU per GiB unpacked", "s", [cost["cpu"] / unpacked for cost in costs]))
    bench.add(Row("index in the registry per GiB unpacked", "MiB", [cost["index_bytes"] / unpacked / (1 << 20)]))
    bench.add(Row("index in the registry per GiB of layers", "MiB", [cost["index_bytes"] / compressed / (1 << 20)]))
    bench.note(f"The image: {len(image.layers)} layers, {image.compressed_size / 1e6:.0f} MB compressed, "
               f"{image.unpacked_size / 1e6:.0f} MB in {image.files:,} files unpacked; "
               f"converted: {cost['converted_bytes'] / 1e6:.0f} MB.")  # fmt: skip


def _round(lab: Lab, image: Image, rate: str, starts_of: dict[str, list[starts.Start]], left: dict[str, list[float]],
           ordinary: list[starts.Start]) -> dict[str, Any]:  # fmt: skip
    network = Network(lab)
    host = network.host("registry", rate)
    registry = Registry(lab, host)
    names = {kind: f"{registry.address}/bench/{kind.replace(' ', '-')}:latest" for kind in _KINDS}
    for kind in ("indexed", "first sight"):
        image.push(names[kind], prefix=host.prefix)
    cost = _publish(lab, host, names)
    containerd = Containerd(lab, network.host("plain", rate))
    ordinary.append(starts.ordinarily(containerd, image, names["first sight"], lab.root / "plain"))
    containerd.stop()
    for number, kind in enumerate(_KINDS):
        near = network.host(f"super{number}", rate)
        superpeer = Superpeer(lab, near, [registry.address], name=f"superpeer{number}")
        node = Node(lab, network.host(f"node{number}", rate), [superpeer.url], name=f"node{number}")
        directory = lab.root / f"image{number}"
        before = near.traffic()
        starts_of[kind].append(starts.lazily(node, image, names[kind], directory))
        size = cost["converted_bytes"] if kind == "converted" else image.compressed_size
        left[kind].append((near.traffic() - before).received / size)
        node.dadi("umount", str(directory))
        node.stop()
        superpeer.stop()
    return cost


def _publish(lab: Lab, host: Host, names: dict[str, str]) -> dict[str, Any]:
    """Index and convert on the registry's own host; return the CPU seconds and sizes."""
    before = os.times()
    indexed = _dadi(lab, host, "index", names["indexed"])
    after = os.times()
    converted = _dadi(lab, host, "convert", names["first sight"], names["converted"])
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cpu": cpu, "index_bytes": _index_bytes(indexed), "converted_bytes": converted["after_bytes"]}


def _dadi(lab: Lab, host: Host, *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(dadi(lab, *arguments, "--plain-http", "--json", host=host).stdout)
    return answer


def _index_bytes(report: dict[str, Any]) -> int:
    return sum(layer["index_bytes"] + layer["seek_bytes"] for layer in report["platforms"][0]["layers"])
