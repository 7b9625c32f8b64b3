"""What of the FUSE mount outlives this process: /dev/fuse with `fuse/state.py`'s text, in a store of descriptors.

    start   take what is left ─► its files open again (`Devices.reopen`) ─► serve, and have the unanswered sent again
    then    keep it; a keeper that ends is replaced, since we still have the descriptor
    stop    lazy images mounted: leave, nothing unmounted; else unmount, and let go of it

What cannot be taken over (damaged, unmounted, a kernel before 6.9) is said, and mounted anew. What a version too new
has left is not touched: the start is refused, and its readers wait for that version. A keeper that does not answer
(stopped, a busy machine) may hold a mount whose readers wait: it is asked again, and at last the start is refused;
never is a second FUSE mount put over the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

import structlog

from dadi.errors import DadiError, NotFound, Unavailable, Unreachable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.keeper.client import KeeperProcess
from dadi.keeper.store import DescriptorStore, close_all
from dadi.keeper.systemd import SystemdStore
from dadi.node import kernel
from dadi.node.in_kernel import in_kernel
from fuse import state
from fuse.session import Session
from fuse.state import State

log = structlog.get_logger()
_NAME = "fuse"
_AGAIN = 1.0
"""Seconds between two tries to replace a keeper, or to be heard by one."""
_PATIENCE = 60.0
"""Seconds for a keeper to say what it holds, before a start is refused."""


class LeftMount(NamedTuple):
    """/dev/fuse of a mount that an earlier process has left, and what is known of it."""

    fd: int
    state: State


class Handover:
    """The descriptor store of one node, whose sockets are in the directory `run`."""

    def __init__(self, run: Path, fallbacks: Fallbacks, environment: MutableMapping[str, str] = os.environ) -> None:
        self._run = run
        self._fallbacks = fallbacks
        self._environment = environment
        self._store: DescriptorStore | None = None
        self._watched = -1
        self._session: Session | None = None
        self._kept: tuple[DescriptorStore | None, int, bytes] | None = None
        """By whom, which descriptor, with which text."""
        self._replacing: asyncio.Task[None] | None = None
        self._alone = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Handover({self._store!r})"

    async def take(self, directory: Path) -> LeftMount | None:
        """Return the mount on `directory` that an earlier process has left; None, having said why, if there is none.

        What cannot be taken over is let go of: its readers get errors, and the place is free. Raises Unsupported if a
        version of dadi that is too new has left it; Unavailable if a mount stands there and the keeper does not say
        what it holds, for long: to mount anew would cut off readers that could have gone on.
        """
        try:
            taken = await self._taken(directory)
        except Unreachable as error:
            if await in_kernel(kernel.mounted_at, directory) is not None:
                hint = "is it stopped? `kill -CONT` it; or kill it: what reads lazy images gets errors then"
                raise Unavailable(f"a FUSE mount stands on {directory}, and {error}", hint=hint) from None
            self._fallbacks.note("FUSE mount not kept over a restart", str(error))
            return None
        except DadiError as error:
            self._fallbacks.note("FUSE mount not kept over a restart", str(error))
            return None
        close_all(taken, _NAME)
        if _NAME not in taken:
            return None
        fd, text = taken[_NAME]
        try:
            left = LeftMount(fd, state.decode(text))
            await in_kernel(_check, left, directory)
            return left
        except DadiError as error:
            os.close(fd)
            if isinstance(error, Unsupported) and await in_kernel(kernel.mounted_at, directory) is not None:
                raise
            log.error("the FUSE mount of the process before cannot be taken over", why=str(error))
            self._fallbacks.note("lazy mounts not taken over", str(error))
            await self.drop()
            return None

    async def _taken(self, directory: Path) -> dict[str, tuple[int, bytes]]:
        """Return what the store holds; asks again for as long as it does not answer and something may be lost."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                async with self._alone:
                    store = await self._open()
                    return await asyncio.to_thread(store.take)
            except Unreachable as error:
                self._hang_up()
                if time.monotonic() > deadline or await in_kernel(kernel.mounted_at, directory) is None:
                    raise
                self._fallbacks.note("dadi-keeper does not answer", str(error))
                await asyncio.sleep(_AGAIN)

    async def keep(self, session: Session) -> bool:
        """Have the session's descriptor held from now on; say whether it is. What prevents it is said.

        A keeper that does not answer is asked again later.
        """
        if session.offered is None or not session.can_resend:
            self._fallbacks.note("FUSE mount not kept over a restart", "the kernel is older than 6.9: no FUSE resend")
            return False
        self._session = session
        try:
            await self._keep(session)
        except DadiError as error:
            self._fallbacks.note("FUSE mount not kept over a restart", str(error))
            if isinstance(error, Unavailable):
                self._begin_to_replace()
            return False
        return True

    async def _keep(self, session: Session) -> bool:
        """Have it held; False if it was."""
        assert session.offered is not None
        async with self._alone:
            there = await in_kernel(kernel.mounted_at, session.directory)
            fd = session.fd
            if there is None or fd < 0:
                raise NotFound(f"the FUSE mount on {session.directory} is gone")
            text = state.encode(session.offered, session.max_read, there.device)
            if self._kept == (self._store, fd, text) and not self._has_ended():
                return False
            try:
                await asyncio.to_thread((await self._open()).put, _NAME, fd, text)
            except Unavailable:  # it ended just now
                self._hang_up()
                await asyncio.to_thread((await self._open()).put, _NAME, fd, text)
            self._kept = (self._store, fd, text)
            return True

    async def drop(self) -> None:
        """Let go of the descriptor."""
        self._session = None
        async with self._alone:
            self._kept = None
            if self._store is not None:
                with contextlib.suppress(DadiError):  # then it is held by nobody any more
                    await asyncio.to_thread(self._store.drop, _NAME)

    async def close(self) -> None:
        """Hang up; what is held stays held."""
        self._session = None
        if self._replacing is not None:
            self._replacing.cancel()
            await asyncio.gather(self._replacing, return_exceptions=True)
        self._hang_up()
        if self._store is not None:
            self._store.close()
            self._store = None

    async def _open(self) -> DescriptorStore:
        if self._store is None:
            if SystemdStore.offered(self._environment):
                self._store = SystemdStore(self._environment)
            else:
                self._store = await asyncio.to_thread(KeeperProcess.connect, self._run / "keeper.sock")
            if self._store.fd >= 0:
                self._watched = self._store.fd
                asyncio.get_running_loop().add_reader(self._watched, self._lost)
        return self._store

    def _hang_up(self) -> None:
        """Let another keeper be looked for. systemd is asked by messages, and what it gave us it gives but once."""
        self._unwatch()
        if isinstance(self._store, KeeperProcess):
            self._store.close()
            self._store = None

    def _unwatch(self) -> None:
        if self._watched >= 0:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched = -1

    def _lost(self) -> None:
        """The keeper has ended, or was given up, or answers a question of ours."""
        store = self._store
        if not isinstance(store, KeeperProcess) or not store.has_ended():
            return
        self._unwatch()
        if not self._alone.locked():  # else whoever has it hears of it, and begins anew
            self._hang_up()
        self._begin_to_replace()

    def _begin_to_replace(self) -> None:
        if self._session is not None and (self._replacing is None or self._replacing.done()):
            self._replacing = asyncio.create_task(self._replace(self._session))

    async def _replace(self, session: Session) -> None:
        while session is self._session and session.fd >= 0:
            try:
                if await self._keep(session) and isinstance(self._store, KeeperProcess):
                    self._fallbacks.note("dadi-keeper was gone, replaced", str(self._run / "keeper.sock"))
                return
            except DadiError as error:
                self._fallbacks.note("FUSE mount not kept over a restart", str(error))
            await asyncio.sleep(_AGAIN)

    def _has_ended(self) -> bool:
        return isinstance(self._store, KeeperProcess) and self._store.has_ended()


def _check(left: LeftMount, directory: Path) -> None:
    """Raise unless what is mounted on `directory` is served through this descriptor."""
    there = kernel.mounted_at(directory)
    if there is None or (there.kind, there.device) != ("fuse.dadi", left.state.device):
        raise NotFound(f"the FUSE mount {left.state.device} is not on {directory} any more")
    poll = select.poll()
    poll.register(left.fd, select.POLLIN)
    if any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0)):
        raise Unavailable(f"the FUSE connection of {directory} was ended")
