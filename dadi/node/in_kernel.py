"""Calls that wait in the kernel, in threads of their own.

An unmount, or re-pointing a loop device, ends when the reads under way have ended; those need threads to verify what
comes. So none of these calls may take a thread from the pool that verification uses (asyncio's default one): eight
unmounts would wait for reads that wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_threads = ThreadPoolExecutor(64, thread_name_prefix="kernel")
_under_way: set[Future[Any]] = set()


async def in_kernel(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a blocking call of `dadi/node/kernel.py`, `loop.py` or `fuse/`; cancelling us does not stop it.

    What it then returns to nobody is closed if it can be: an attached loop device would stay for ever.
    """
    future = _threads.submit(partial(call, *args, **kwargs))
    _under_way.add(future)
    future.add_done_callback(_under_way.discard)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        future.add_done_callback(_let_go)
        raise


def _let_go(future: Future[Any]) -> None:
    if not future.cancelled() and future.exception() is None:
        close = getattr(future.result(), "close", None)
        if close is not None:
            _threads.submit(close)  # it may wait for reads: not on the event loop, if that is where we are


def under_way() -> int:
    """Return how many calls have not come back, cancelled or not."""
    return len(_under_way)
