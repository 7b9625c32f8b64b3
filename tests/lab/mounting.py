"""A node in the test's own process and event loop, on the real kernel: for tests that look into it while it mounts.

What lives here: starting one, mounting, and reading from a mount without stopping the loop that has to answer the
read. What never does: nodes as processes of their own (tests/lab/processes.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from dadi.node.config import BackfillConfig, NodeConfig, PeersConfig
from dadi.node.node import Node
from tests.lab.cleanup import loops

T = TypeVar("T")
LAZY = BackfillConfig(enabled=False)
EAGER = BackfillConfig(quiet=0.0)
_READERS = ThreadPoolExecutor(16)
"""Not the default ones: a read may hang, and must not take a thread that the node needs."""


@contextlib.asynccontextmanager
async def node_of(directory: Path, *urls: str, **options: Any) -> AsyncIterator[Node]:
    """Run a node below `directory`, with the superpeers at `urls` (none: it embeds one).

    Without `options` it fetches what is read and nothing else, and unmounts when it stops.
    """
    options.setdefault("backfill", LAZY)
    options.setdefault("unmount_on_stop", True)
    options.setdefault("peers", PeersConfig(listen="127.0.0.1:0"))
    config = NodeConfig(
        state=str(directory / "node" / "state"), run=str(directory / "node" / "run"), superpeers=tuple(urls), **options
    )
    node = await Node.start(config)
    try:
        yield node
    finally:
        await node.close()


async def mounted(node: Node, reference: str, directory: Path) -> dict[str, Any]:
    """Mount, and return the row of the status."""
    async with contextlib.aclosing(node.mounts.mount(reference, str(directory), node.platform)) as events:
        async for event in events:
            last: dict[str, Any] = event
    assert last["event"] == "mounted"
    return last


async def in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_READERS, work)


async def read(path: Path) -> bytes:
    return await in_thread(path.read_bytes)


def begin_to_read(path: Path) -> None:
    """Have the kernel read ahead, and go away without waiting for it."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 1 << 20, os.POSIX_FADV_WILLNEED)


def loops_below(directory: Path) -> list[str]:
    """Return the loop devices whose backing file is below the directory."""
    return sorted(Path(device).name for device, file in loops().items() if file.startswith(str(directory)))
