"""Calls that wait in the kernel, in threads of their own.

An unmount, or re-pointing a loop device, ends when the reads under way have ended; those need threads to verify what
comes. So none of these calls may take a thread from the pool that verification uses (asyncio's default one): eight
unmounts would wait for reads that wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_threads = ThreadPoolExecutor(64, thread_name_prefix="kernel")


async def in_kernel(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a blocking call of `dadi/node/kernel.py`, `loop.py` or `fuse/`; cancelling us does not stop it."""
    return await asyncio.get_running_loop().run_in_executor(_threads, partial(call, *args, **kwargs))
