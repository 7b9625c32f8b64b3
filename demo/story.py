"""The demo's acts, in order, each with what it measures. What is printed where is decided here, how in demo/screen.py.

    registry ─┬─ superpeer          each link shaped to the same rate; all in network namespaces of this machine
              ├─ plain              containerd: the ordinary way
              ├─ first              a node, while the superpeer has never seen the image
              ├─ second             a node, when the superpeer knows it
              ├─ third              a node, and containerd that has it as a snapshotter
              └─ fresh, indexed     another superpeer and its first node, when `dadi index` was run after the build
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from demo.screen import Bar, Screen, megabytes
from tests.lab import starts
from tests.lab.cleanup import Lab
from tests.lab.containerd import Containerd
from tests.lab.network import Host, Network
from tests.lab.oci_layout import Image
from tests.lab.processes import LabFailed, Node, Registry, Superpeer, dadi
from tests.lab.starts import Start

_FAST = "1gbit"
_SNAPSHOTTER = "third/run/snapshotter.sock"
"""Where the last node's socket will be in the lab: containerd's configuration names it from the start."""


class Story:
    """One run of the demo, in a lab. `speed` is the links' rate in tc's notation."""

    def __init__(self, lab: Lab, screen: Screen, image: Image, speed: str) -> None:
        self._lab = lab
        self._screen = screen
        self._image = image
        self._speed = speed
        self._network = Network(lab)

    def tell(self) -> None:
        """All acts."""
        image, screen = self._image, self._screen
        registry_host = self._host("registry")
        registry = Registry(self._lab, registry_host)
        reference = f"{registry.address}/demo/python:latest"
        with screen.working("pushing the image to the registry"):
            start = time.monotonic()
            image.push(reference, prefix=registry_host.prefix)
        screen.fact("image", f"{len(image.layers)} layers: {megabytes(image.compressed_size)} in the registry, "
                    f"{megabytes(image.unpacked_size)} in {image.files:,} files unpacked")  # fmt: skip
        screen.fact("registry", f"Debian's docker-registry, pushed in {time.monotonic() - start:.1f} s, as it is")

        plain = self._ordinary(reference)
        superpeer = Superpeer(self._lab, self._host("superpeer"), [registry.address])
        first = self._first_sight(reference, superpeer)
        superpeer.stop()
        indexed = self._indexed(reference, registry, registry_host)
        superpeer = Superpeer(self._lab, self._network.hosts["superpeer"], [registry.address])
        self._second(reference, superpeer, plain, first, indexed)
        self._containers(reference, superpeer, plain)

    def _host(self, name: str) -> Host:
        return self._network.host(name, self._speed)

    def _ordinary(self, reference: str) -> Start:
        """Act 1: pull all, unpack all, start."""
        screen = self._screen
        screen.section("1  The ordinary way: containerd pulls all of it, unpacks all of it, then the program starts")
        self._containerd = Containerd(self._lab, self._host("plain"), snapshotter=self._lab.root / _SNAPSHOTTER)
        directory = self._lab.root / "plain"
        with screen.working("containerd pulls and unpacks the image"):
            start = starts.ordinarily(self._containerd, self._image, reference, directory)
        screen.event(start.ready, f"pulled and unpacked: {megabytes(start.on_link)} had crossed the network")
        screen.event(start.first_line, f"the program says: {start.line}")
        return start

    def _first_sight(self, reference: str, superpeer: Superpeer) -> Start:
        """Act 2: nobody has indexed the image; the superpeer does it while it streams from the registry, once."""
        screen = self._screen
        screen.section("2  First sight: a node asks a superpeer that has never seen the image")
        node = Node(self._lab, self._host("first"), [superpeer.url], name="first")
        directory = self._lab.root / "first-image"
        result = self._start(node, reference, directory, "the superpeer takes the image from the registry, indexes it")
        taken = megabytes(superpeer.status()["registry_bytes"])
        screen.fact("superpeer", f"took {taken} from the registry, each layer once; from now on it knows the image")
        node.dadi("umount", str(directory))
        node.stop()
        return result

    def _indexed(self, reference: str, registry: Registry, registry_host: Host) -> Start:
        """Act 3: the index was made where the image was built; the very first node starts lazily."""
        screen = self._screen
        screen.section("3  Indexed: `dadi index` has put an index beside the image; a superpeer that has never seen it")
        start = time.monotonic()
        with screen.working("dadi index: the build's last step, beside the registry"):
            done = dadi(self._lab, "index", reference, "--plain-http", "--json", host=registry_host)
        layers = json.loads(done.stdout)["platforms"][0]["layers"]
        size = sum(layer["index_bytes"] + layer["seek_bytes"] for layer in layers)
        screen.fact("index", f"{megabytes(size)} for {megabytes(self._image.compressed_size)} of layers, made in "
                    f"{time.monotonic() - start:.1f} s; the image is as it was")  # fmt: skip
        superpeer = Superpeer(self._lab, self._host("fresh"), [registry.address], name="fresh")
        node = Node(self._lab, self._host("indexed"), [superpeer.url], name="indexed")
        directory = self._lab.root / "indexed-image"
        result = self._start(node, reference, directory, "the superpeer fetches the ranges that are asked for")
        taken = superpeer.status()["registry_bytes"]
        screen.fact("superpeer", f"took {megabytes(taken)} of layers from the registry until then: "
                    f"{taken / self._image.compressed_size:.0%}")  # fmt: skip
        node.dadi("umount", str(directory))
        node.stop()
        superpeer.stop()
        return result

    def _second(self, reference: str, superpeer: Superpeer, plain: Start, first: Start, indexed: Start) -> None:
        """Acts 4 to 6: the main job with a warm superpeer, the backfill, and the proof."""
        screen = self._screen
        screen.section("4  From then on: another node, the same image, the superpeer knows it")
        host = self._host("second")
        node = Node(self._lab, host, [superpeer.url], name="second")
        directory = self._lab.root / "image"
        second = self._start(node, reference, directory, "mounting")
        self._compare(plain, first, indexed, second)
        self._backfill(node, host)
        self._prove(node, directory)
        # nobody answers for the mount any more: it ends like any other
        subprocess.run(["umount", str(directory)], check=True)

    def _start(self, node: Node, reference: str, directory: Path, waiting: str) -> Start:
        screen = self._screen
        screen.event(0, f"dadi mount {reference} {directory.name}")

        def mounted(seconds: float) -> None:
            screen.event(seconds, f"mounted: {megabytes(starts.received(node.status()))} had crossed the network")

        with screen.working(waiting):
            start = starts.lazily(node, self._image, reference, directory, mounted)
        screen.event(start.first_line, f"the program says: {start.line}", strong=True)
        share = start.received / self._image.compressed_size
        screen.fact("network", f"{megabytes(start.received)} had crossed it by then ({megabytes(start.on_link)} with "
                    f"headers): {share:.0%} of what a pull takes")  # fmt: skip
        return start

    def _compare(self, plain: Start, first: Start, indexed: Start, second: Start) -> None:
        screen = self._screen
        screen.section(f"Until the program's first line, with every link at {spoken(self._speed)}")

        def sooner(start: Start) -> str:
            times = plain.first_line / start.first_line
            return f"{times:.1f} times sooner" if times >= 1 else f"{1 / times:.1f} times later"

        screen.bars([
            Bar("ordinary", plain.first_line, plain.on_link, "pull, unpack, start", "red"),
            Bar("first sight", first.first_line, first.on_link, sooner(first), "yellow"),
            Bar("indexed", indexed.first_line, indexed.on_link, sooner(indexed), "yellow"),
            Bar("from then on", second.first_line, second.on_link, sooner(second), "green"),
        ])  # fmt: skip

    def _backfill(self, node: Node, host: Host) -> None:
        screen = self._screen
        screen.section("5  The rest arrives in the background")
        host.shape(_FAST)
        self._network.hosts["superpeer"].shape(_FAST)
        screen.fact("links", f"opened to {spoken(_FAST)} for this, so that nobody has to wait for it")
        start = time.monotonic()
        row = node.status()["mounts"][0]
        with screen.progress("backfill", row["bytes"]) as bar:
            while row["state"] == "lazy":
                bar.update(row["bytes_present"])
                time.sleep(0.1)
                row = node.status()["mounts"][0]
                if not node.alive:
                    raise LabFailed(f"the node ended during backfill:\n{node.tail()}")
            bar.update(row["bytes_present"])
        if row["state"] != "local":
            raise LabFailed(f"the mount is {row['state']} after backfill:\n{node.tail()}")
        screen.good(f"local: the daemon is no longer in the read path (after {time.monotonic() - start:.1f} s)")

    def _containers(self, reference: str, superpeer: Superpeer, plain: Start) -> None:
        """Act 7: the same by containerd and runc, with dadi-node as containerd's snapshotter."""
        screen, containerd = self._screen, self._containerd
        screen.section("7  As containerd runs it: a container by runc, on overlayfs and on the dadi snapshotter")
        self._network.hosts["superpeer"].shape(self._speed)
        start = time.monotonic()
        with screen.working("overlayfs: the image that was pulled in act 1"):
            said = containerd.run(reference, "ordinary", self._image.command).strip()
        ordinary = plain.ready + time.monotonic() - start
        screen.event(ordinary, f"overlayfs, with the pull of act 1: {said}")
        host = self._host("third")
        node = Node(self._lab, host, [superpeer.url], name=_SNAPSHOTTER.split("/")[0])
        before, start = host.traffic(), time.monotonic()
        with screen.working("dadi pull, then ctr run --snapshotter dadi"):
            containerd.pull_lazily(reference, host)
            pulled = time.monotonic() - start
            said = containerd.run(reference, "lazy", self._image.command, "dadi").strip()
        lazy = time.monotonic() - start
        screen.event(pulled, "pulled: manifest, config, and a snapshot for each layer")
        screen.event(lazy, f"dadi, with its pull: {said}", strong=True)
        on_link = (host.traffic() - before).received
        screen.bars([
            Bar("overlayfs", ordinary, plain.on_link, "ctr image pull, ctr run", "red"),
            Bar("dadi", lazy, on_link, f"dadi pull, ctr run: {ordinary / lazy:.1f} times sooner", "green"),
        ])  # fmt: skip
        containerd.ctr("image", "rm", "--sync", reference)
        containerd.stop()
        node.stop()

    def _prove(self, node: Node, directory: Path) -> None:
        screen = self._screen
        screen.section("6  The proof: dadi-node is killed, the page cache dropped, and everything read again")
        status = node.kill()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        start = time.monotonic()
        with starts.program(self._image, directory) as line:
            screen.event(time.monotonic() - start, f"dadi-node is dead ({-status}); the program says: {line}")
        size, files = read_all(directory)
        if (size, files) != (self._image.unpacked_size, self._image.files):
            raise LabFailed(f"read {size} bytes in {files} paths, the image has {self._image.unpacked_size} in "
                            f"{self._image.files}")  # fmt: skip
        screen.event(time.monotonic() - start, f"all of it read: {megabytes(size)} in {files:,} files", strong=True)


def read_all(directory: Path) -> tuple[int, int]:
    """Read every file below `directory`; returns the bytes (hard links once) and the number of paths."""
    size, count, seen = 0, 0, set[int]()
    for place, directories, files in os.walk(directory):
        count += len(directories) + len(files)
        for name in files:
            path = os.path.join(place, name)
            if not os.path.isfile(path) or os.path.islink(path) or (inode := os.lstat(path).st_ino) in seen:
                continue
            seen.add(inode)
            with open(path, "rb", buffering=0) as file:
                while data := file.read(1 << 20):
                    size += len(data)
    return size, count


def spoken(rate: str) -> str:
    """Return tc's "100mbit" as "100 Mbit/s"."""
    number, unit = rate.rstrip("abcdefghijklmnopqrstuvwxyz"), rate.lstrip("0123456789.")
    return f"{number} {unit.capitalize()}/s"
