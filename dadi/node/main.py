"""`dadi-node`: the process. Starts the node, serves its control socket until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from dadi import http, program
from dadi.node import control
from dadi.node.config import NodeConfig
from dadi.node.in_kernel import under_way
from dadi.node.node import Node
from dadi.node.proxying import PlainPulls
from dadi.notify import notify

if TYPE_CHECKING:
    from dadi.containerd.cri import Proxying
    from dadi.grpc_socket import Serving
    from dadi.snapshotter.snapshots import Snapshots

log = structlog.get_logger()
_SWITCH_INTERVAL = 0.0005
"""Seconds until a thread that wants the interpreter gets it: with Python's 5 ms a hit would wait that long for the GIL
while the event loop is busy."""


async def serve(config: NodeConfig, stop: asyncio.Event) -> None:
    """Run a node until `stop` is set."""
    sys.setswitchinterval(_SWITCH_INTERVAL)
    node = await _started(config, stop)
    if node is None:
        return
    try:
        runner = await http.serve_unix(control.create(node), str(Path(config.run) / "node.sock"))
        snapshotter = cri = None
        try:
            if config.proxy.enabled:
                node.proxying = await PlainPulls.start(node)
            if config.cri.enabled:
                cri = await _cri(config, node)
            if node.snapshots is not None:
                snapshotter = await _snapshotter(config, node.snapshots)
            log.info("node is ready", run=config.run, state=config.state, mounts=len(node.mounts.statistics()))
            notify.ready()
            await stop.wait()
        finally:
            if cri is not None:
                await cri.stop()
            if snapshotter is not None:
                await snapshotter.stop()
            await runner.cleanup()
    finally:
        await node.close()
        _end_if_stuck()


async def _snapshotter(config: NodeConfig, snapshots: Snapshots) -> Serving:
    # Here, since grpc takes its time to be imported, and not every node has a containerd.
    from dadi.snapshotter.service import serve as serve_snapshots

    return await serve_snapshots(Path(config.run) / "snapshotter.sock", snapshots)


async def _cri(config: NodeConfig, node: Node) -> Proxying:
    from dadi.containerd.cri import serve as serve_cri

    path = Path(config.run) / "cri.sock"
    return await serve_cri(path, config.cri.containerd, node.keychain.pulls, node.fallbacks)


def _end_if_stuck() -> None:
    """End at once if a call waits in the kernel for reads that only our successor can answer.

    The interpreter would wait for its thread, and the successor for us.
    """
    if under_way():
        log.warning("stopped while calls wait in the kernel: the next process has them answered", calls=under_way())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


async def _started(config: NodeConfig, stop: asyncio.Event) -> Node | None:
    """Return the node, or None if we are told to stop before it stands: restoring mounts may take its time."""
    starting, stopping = asyncio.create_task(Node.start(config)), asyncio.create_task(stop.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        if starting.cancelled():
            return None
    return starting.result()


main = program.daemon(
    "dadi-node",
    "Mount container images whose bytes arrive while they run: block devices, backfill, and the control socket "
    "that `dadi` talks to. Needs root, /dev/fuse and loop devices (`dadi doctor`).",
    NodeConfig,
    serve,
)

if __name__ == "__main__":
    main()
