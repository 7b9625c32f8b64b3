"""Several layers at a time: bounded, stopped together, in a directory that goes away with them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from dadi.errors import StoreFull

T = TypeVar("T")

LAYERS_AT_ONCE = 2
"""Each keeps three threads busy, and its bytes on disk."""


@contextlib.asynccontextmanager
async def workspace() -> AsyncIterator[Path]:
    """Give a directory for temporary files ($TMPDIR says where)."""
    try:
        directory = await asyncio.to_thread(tempfile.mkdtemp, prefix="dadi-layers-")
    except OSError as error:
        raise StoreFull(f"no temporary directory can be made: {error.strerror}", hint="set TMPDIR") from None
    try:
        yield Path(directory)
    finally:
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what each of them returns; when one fails the others are stopped, and its error is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

