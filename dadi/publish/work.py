"""Several layers at a time: bounded, stopped together, in a directory that goes away with them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dadi.errors import StoreFull

T = TypeVar("T")

LAYERS_AT_ONCE = 2
"""Each keeps three threads busy, and its bytes on disk."""


@contextlib.asynccontextmanager
async def workspace() -> AsyncIterator[Path]:
    """Give a directory for temporary files ($TMPDIR says where)."""
    with temporary("no temporary directory can be made"):
        directory = await asyncio.to_thread(tempfile.mkdtemp, prefix="dadi-layers-")
    try:
        yield Path(directory)
    finally:
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))


class _Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=_Closable)


async def opened(work: Callable[[], C]) -> C:
    """Return what `work`, in a thread, opens; if we are cancelled meanwhile it is closed as soon as it is open."""
    opening = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_let_go)
        raise


def _let_go(opening: asyncio.Future[C]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


@contextlib.contextmanager
def temporary(failed: str) -> Iterator[None]:
    """Raise StoreFull, which begins with `failed`, where the disk for temporary files refuses."""
    try:
        yield
    except OSError as error:
        raise StoreFull(f"{failed}: {error.strerror or error}", hint="set TMPDIR") from None


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what each of them returns; when one fails the others are stopped, and its error is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

