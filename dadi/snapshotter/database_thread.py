"""The database in its own thread: one at a time, in the order of asking, never on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from dadi.snapshotter.db import Database, open_database

P = ParamSpec("P")
R = TypeVar("R")


class DatabaseThread:
    """`await kept(Database.get, name)`. A caller that is cancelled: the transaction happens whole or not at all, and
    before every transaction that is asked for later.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._database: Database | None = None

    async def open(self, root: Path, *, replace_damaged: bool) -> None:
        """See `open_database`."""
        opening = partial(open_database, root, replace_damaged=replace_damaged)
        self._database = await asyncio.get_running_loop().run_in_executor(self._thread, opening)

    async def __call__(self, method: Callable[Concatenate[Database, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        assert self._database is not None
        call = partial(method, self._database, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def counts(self) -> dict[str, int]:
        """Return `Database.counts` as they are now."""
        return dict(self._database.counts) if self._database else {}

    async def close(self) -> None:
        """Close the file after all that was asked for; harmless when called again."""
        database, self._database = self._database, None
        if database is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, database.close)
        self._thread.shutdown(wait=False)
