"""A relay that delays: `python -m tests.lab.relay LISTEN TARGET RTT` stands in for a long way between two machines.

    each connection    is opened after one round-trip time (TCP's own handshake with the target is added to it)
    each byte          comes out half a round-trip time after it went in, in order; the bandwidth stays what it was

What lives here: that, for kernels without netem. What never does: dropping or changing anything. The bytes wait in a
pipe, and go into it and out of it by `splice`: what is measured on the same processors is not the relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

_PIPES = (16 << 20, 1 << 20)
"""Bytes under way in one direction, the first that the kernel allows: 16 MiB are a gigabit at 250 ms (root's)."""
_PIECE = 1 << 20


class Relay:
    """Relays connections to `target` (host, port)."""

    def __init__(self, target: tuple[str, int], rtt: float) -> None:
        """`rtt`: seconds."""
        self._target = target
        self._rtt = rtt
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port."""
        self._listener = socket.create_server((host, port), backlog=1024)
        self._listener.setblocking(False)
        self._own(self._accept(self._listener))
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """Listen no more, and cut all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            caller, _ = await asyncio.get_running_loop().sock_accept(listener)
            self._own(self._serve(caller))

    async def _serve(self, caller: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with caller, socket.socket(socket.AF_INET) as called, contextlib.suppress(OSError):
            await asyncio.sleep(self._rtt)
            called.setblocking(False)
            await loop.sock_connect(called, self._target)
            for end in (caller, called):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with _Way(caller, called, self._rtt / 2) as there, _Way(called, caller, self._rtt / 2) as back:
                await asyncio.gather(there.ended, back.ended)


class _Way:
    """One direction of a connection. `ended` is done after its last byte, or raises OSError."""

    def __init__(self, source: socket.socket, target: socket.socket, delay: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        # Both ways of a connection watch both sockets, and a loop knows each descriptor once.
        self._source, self._target, self._delay = source.dup(), target.dup(), delay
        self._out_of, self._into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for size in _PIPES:
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(self._into, fcntl.F_SETPIPE_SZ, size)
                break
        self._due: deque[tuple[float, int]] = deque()
        """When how many bytes may come out; none: the end."""
        self._timer: asyncio.TimerHandle | None = None
        self._watch(True)

    def __enter__(self) -> _Way:
        return self

    def __exit__(self, *_: object) -> None:
        self._watch(False)
        self._loop.remove_writer(self._target.fileno())
        if self._timer:
            self._timer.cancel()
        os.close(self._out_of)
        os.close(self._into)
        self._source.close()
        self._target.close()

    def _watch(self, on: bool) -> None:
        if on:
            self._loop.add_reader(self._source.fileno(), self._or_end, self._in)
        else:
            self._loop.remove_reader(self._source.fileno())

    def _or_end(self, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as error:
            if not self.ended.done():
                self.ended.set_exception(error)
            self._watch(False)

    def _in(self) -> None:
        try:
            count = os.splice(self._source.fileno(), self._into, _PIECE)
        except BlockingIOError:
            if self._due:
                self._watch(False)  # the pipe is full: again when something has come out
            return
        if not count:
            self._watch(False)
        self._due.append((self._loop.time() + self._delay, count))
        if len(self._due) == 1:
            self._later()

    def _later(self) -> None:
        self._timer = self._loop.call_at(self._due[0][0], self._or_end, self._out)

    def _out(self) -> None:
        self._loop.remove_writer(self._target.fileno())
        while self._due:
            due, count = self._due[0]
            if due > self._loop.time():
                self._later()
                return
            if not count:
                self._target.shutdown(socket.SHUT_WR)
                self.ended.set_result(None)
                return
            try:
                went = os.splice(self._out_of, self._target.fileno(), count)
            except BlockingIOError:
                self._loop.add_writer(self._target.fileno(), self._or_end, self._out)
                return
            self._due.popleft()
            if went < count:
                self._due.appendleft((due, count - went))
            if not any(left == 0 for _, left in self._due):
                self._watch(True)


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
