"""Starting an image's program, the lazy way and the ordinary way, with a clock and the byte counters beside it.

What lives here: what demo and benchmark measure, so that both measure the same. What never does: printing.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.containerd import Containerd
from tests.lab.oci_layout import Image
from tests.lab.processes import LabFailed, Node


@dataclass(frozen=True)
class Start:
    """How a start went. Seconds and bytes count from the moment somebody asked for the image.

    `ready`: the image was mounted (or pulled and unpacked); `first_line`: the program, started right then, had printed
    it. `received`: bytes that had crossed the network at the first line, as the program that fetched them tells it
    (`dadi status --json`); `on_link`: as the network interface counted them, with all headers.
    """

    ready: float
    first_line: float
    line: str
    received: int
    on_link: int


def lazily(node: Node, image: Image, reference: str, directory: Path,
           on_ready: Callable[[float], None] = lambda seconds: None) -> Start:  # fmt: skip
    """`dadi mount`, then the program. `on_ready` is called with the seconds when it is mounted."""
    assert node.host is not None
    directory.mkdir()
    before, received_before, start = node.host.traffic(), received(node.status()), time.monotonic()
    node.dadi("mount", reference, str(directory))
    ready = time.monotonic() - start
    on_ready(ready)
    with program(image, directory) as line:
        first_line = time.monotonic() - start
        on_link = (node.host.traffic() - before).received
        fetched = received(node.status()) - received_before
    return Start(ready, first_line, line, fetched, on_link)


def ordinarily(containerd: Containerd, image: Image, reference: str, directory: Path,
               on_ready: Callable[[float], None] = lambda seconds: None) -> Start:  # fmt: skip
    """Pull and unpack by containerd, then the program."""
    assert containerd.host is not None
    before, start = containerd.host.traffic(), time.monotonic()
    pull = containerd.pull(reference)
    on_ready(pull.seconds)
    containerd.mount(reference, directory)
    with program(image, directory) as line:
        first_line = time.monotonic() - start
        on_link = (containerd.host.traffic() - before).received
    containerd.unmount(directory)
    return Start(pull.seconds, first_line, line, image.compressed_size, on_link)


@contextmanager
def program(image: Image, directory: Path) -> Iterator[str]:
    """Run the image's program in its tree at `directory`; enters with its first line, then lets it end.

    Raises LabFailed if it fails or says something else than it should.
    """
    command = image.start_in(directory)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline().rstrip("\n")
            yield line
            _, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 or line != image.facts["first_line"]:
        raise LabFailed(f"the program in {directory} ended with status {process.returncode}: {line!r}\n{errors}")


def received(status: dict[str, Any]) -> int:
    """Return the bytes that a node has received from all its sources, out of its status."""
    return sum(source["wire_bytes"] for source in status["sources"])
