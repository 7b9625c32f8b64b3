"""A node that fetches a startup set by itself, in the order of a trace; nothing of the kernel is between.

What lives here: the node's process (`main`, forked by tests/lab/forking.py): a real node, store, parents, server and
control socket, in which a task of ours stands for the program and its prefetcher. What never does: mounting. With FUSE,
loop devices and a program for each of thirty-two nodes, two processors would be what is measured, and not the network.

    SIGUSR1    read GO, wait for its "begin", fetch what it names, write RESULT (a `Reading`)
    GO         {"image": reference, "begin": on the monotonic clock, "startup": [[diff ID, first chunk, stop], …]}
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dadi import config, http, log, program
from dadi.blobs.source import Urgency
from dadi.errors import DadiError
from dadi.index.chunks import Blob
from dadi.node import control
from dadi.node.config import NodeConfig
from dadi.node.node import Node
from dadi.peers.superpeer import image_answer
from tests.lab.reading import Reading

_AHEAD = 8
"""Runs that are asked for at a time."""


def main(arguments: Sequence[str]) -> None:
    """CONFIG GO RESULT"""
    path, go, result = arguments
    loaded: NodeConfig = config.load(NodeConfig, path)
    log.configure(loaded.log_level, loaded.log_json)
    asyncio.run(program._until_stopped("dadi-node", loaded, _Prefetching(Path(go), Path(result)).serve))


class _Prefetching:
    def __init__(self, go: Path, result: Path) -> None:
        self._go = go
        self._result = result

    async def serve(self, loaded: NodeConfig, stop: asyncio.Event) -> None:
        node = await Node.start(loaded)
        going = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, going.set)
        task = asyncio.create_task(self._fetch(node, going))
        runner = await http.serve_unix(control.create(node), os.path.join(loaded.run, "node.sock"))
        try:
            await stop.wait()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await runner.cleanup()
            await node.close()

    async def _fetch(self, node: Node, going: asyncio.Event) -> None:
        await going.wait()
        wanted = json.loads(self._go.read_text())
        reading, begin = Reading(), wanted["begin"]
        await asyncio.sleep(max(0.0, begin - time.monotonic()))
        try:
            blobs = await _blobs(node, wanted["image"])
            reading.mounted = time.monotonic() - begin
            places = asyncio.Semaphore(_AHEAD)
            async with asyncio.TaskGroup() as group:
                for digest, first, stop in wanted["startup"]:
                    await places.acquire()
                    group.create_task(_read(node, blobs[digest], range(first, stop), places, reading))
        except* (DadiError, OSError) as errors:
            reading.errors += [str(error) for error in errors.exceptions]
        reading.startup = reading.done = time.monotonic() - begin
        partial = self._result.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(reading)))
        partial.rename(self._result)


async def _blobs(node: Node, image: str) -> dict[str, Blob]:
    """Return the image's layers, by diff ID; their trees have been joined, as by a mount."""
    event: dict[str, Any] = {}
    async with contextlib.aclosing(node.upstream.resolve(image, node.platform)) as events:
        async for event in events:
            if event["event"] == "image":
                break
    index = await node.mounts.metadata.index(image_answer(event))
    node._expect(index)
    blobs = {blob.digest: blob for blob in index.device_blobs()}
    for blob in blobs.values():
        await node.store.prepare(blob)
    return blobs


async def _read(node: Node, blob: Blob, run: range, places: asyncio.Semaphore, reading: Reading) -> None:
    try:
        parts = await node.chain.read(blob, run, Urgency.STARTUP)
        reading.bytes += sum(map(len, parts))
    finally:
        places.release()
