"""Peak resident memory: the superpeer while it indexes a 2 GiB layer, the node with 20 images mounted.

VmHWM of the whole process, since its start, read at the end.
"""

from __future__ import annotations

from bench.harness import Bench, Row
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.network import Host, Network
from tests.lab.processes import Node, Registry, Superpeer

_MIB = 1 << 20
_IMAGES = 20
_NOW = '[backfill]\nquiet = "0s"\n'


def run(bench: Bench) -> None:
    """Measure both daemons, the superpeer also on a layer of very many files."""
    bench.ours = "peak"
    bench.theirs = ""
    large, many = (256 * _MIB, 20_000) if bench.quick else (2 << 30, 200_000)
    with Lab("bench", images.CACHE) as lab:
        network = Network(lab)
        host = network.host("registry")
        registry = Registry(lab, host)
        superpeers = network.host("superpeer")
        nodes = network.host("node")
        for what, files, size, limit in (
            (f"superpeer, indexing a layer of {large >> 20} MiB", 2000, large, 200.0),
            (f"superpeer, indexing a layer of {many:,} files", many, many * 1024, None),
        ):
            bench.say(f"making a layer of {size >> 20} MiB in {files:,} files")
            name = f"layer-{files}"
            image = images.synthetic(lab.root / name, layers=1, files=files, size=size, whiteouts=False)
            reference = f"{registry.address}/bench/{name}:latest"
            image.push(reference, prefix=host.prefix)
            peak = _index(lab, superpeers, nodes, registry.address, reference, name)
            bench.add(Row(what, "MiB", [peak / _MIB], limit=limit))
        bench.say(f"mounting {_IMAGES} images")
        _many_images(bench, lab, host, superpeers, nodes, registry.address)


def _index(lab: Lab, superpeers: Host, nodes: Host, registry: str, reference: str, name: str) -> int:
    superpeer = Superpeer(lab, superpeers, [registry], name=f"superpeer-{name}")
    node = Node(lab, nodes, [superpeer.url], name=f"node-{name}")
    node.dadi("inspect", reference)
    peak = superpeer.peak_memory()
    node.stop()
    superpeer.stop()
    return peak


def _many_images(bench: Bench, lab: Lab, host: Host, superpeers: Host, nodes: Host, registry: str) -> None:
    superpeer = Superpeer(lab, superpeers, [registry])
    node = Node(lab, nodes, [superpeer.url], sections=_NOW)
    kinds = [images.debian_python(), images.host_python()]
    for number in range(_IMAGES):
        if number < len(kinds):
            image = kinds[number]
        else:
            image = images.synthetic(lab.root / f"image-{number}", layers=5, files=400, size=8 * _MIB, seed=number)
        reference = f"{registry}/bench/image-{number}:latest"
        image.push(reference, prefix=host.prefix)
        directory = lab.root / f"mount-{number}"
        directory.mkdir()
        node.dadi("mount", reference, str(directory))
    bench.add(Row(f"node, {_IMAGES} images mounted, now", "MiB", [node.memory() / _MIB]))
    node.wait_until(lambda: all(row["state"] == "local" for row in node.status()["mounts"]), timeout=300)
    bench.add(Row(f"node, {_IMAGES} images mounted and back-filled", "MiB", [node.peak_memory() / _MIB], limit=150.0))
    bench.add(Row("superpeer, which served them", "MiB", [superpeer.peak_memory() / _MIB]))
    for number in range(_IMAGES):
        node.dadi("umount", str(lab.root / f"mount-{number}"))
    bench.note("The images: the Debian one, this machine's Python, and generated ones of 5 layers and 2,000 files.")
