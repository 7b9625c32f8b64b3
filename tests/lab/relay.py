"""A relay that delays: `python -m tests.lab.relay LISTEN TARGET RTT` stands in for a long way between two machines.

    each connection    is opened after one round-trip time (TCP's own handshake with the target is added to it)
    each byte          comes out half a round-trip time after it went in, in order; the bandwidth stays what it was

What lives here: that, for kernels without netem. What never does: dropping or changing anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence

_PIECE = 256 << 10
_MOST = 256
"""Pieces under way in one direction: enough for a gigabit at a round trip of 100 ms."""


class Relay:
    """Relays connections to `target` (host, port)."""

    def __init__(self, target: tuple[str, int], rtt: float) -> None:
        """`rtt`: seconds."""
        self._target = target
        self._rtt = rtt
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=_PIECE)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Listen no more."""
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self._rtt)
        try:
            to_reader, to_writer = await asyncio.open_connection(*self._target, limit=_PIECE)
        except OSError:
            writer.close()
            return
        ways = [asyncio.create_task(self._way(reader, to_writer)), asyncio.create_task(self._way(to_reader, writer))]
        try:
            await asyncio.gather(*ways)
        finally:
            for way in ways:
                way.cancel()
            for each in (writer, to_writer):
                each.close()

    async def _way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MOST)
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                wait = due - loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                if not data:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while True:
                data = await reader.read(_PIECE)
                await queue.put((loop.time() + self._rtt / 2, data))
                if not data:
                    break
            await delivering
        except (ConnectionError, OSError):
            pass
        finally:
            delivering.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError, OSError):
                await delivering


async def _run(listen: str, target: str, rtt: float) -> None:
    host, _, port = listen.rpartition(":")
    to, _, to_port = target.rpartition(":")
    await Relay((to, int(to_port)), rtt).start(host, int(port))
    await asyncio.Event().wait()


def main(arguments: Sequence[str]) -> None:
    """LISTEN TARGET RTT: host:port, host:port, seconds."""
    listen, target, rtt = arguments
    asyncio.run(_run(listen, target, float(rtt)))


if __name__ == "__main__":
    main(sys.argv[1:])
