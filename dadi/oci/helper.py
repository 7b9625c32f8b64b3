"""Programs that know credentials: asked on standard input, answering on standard output, without a shell.

What they say on standard error goes nowhere: it may be about secrets. No program lives longer than its time-out, nor do
its children, and none can fill the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

from dadi.errors import AccessDenied

_MAX_ANSWER = 1 << 20


async def ask(
    command: Sequence[str], question: bytes, *, timeout: float, hint: str, environment: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Return the exit status and the standard output of a program that may take `timeout` seconds.

    `environment` is added to ours. Raises AccessDenied if it cannot be started (`hint` says what to do then), takes too
    long or says more than 1 MiB.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **environment} if environment else None,
        )
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "its command line cannot be used"
        raise AccessDenied(f"the credential helper {command[0]} cannot be started: {why}", hint=hint) from None
    try:
        async with asyncio.timeout(timeout):
            return await _converse(process, question)
    except TimeoutError:
        raise AccessDenied(f"the credential helper {command[0]} did not answer within {timeout:g} s") from None
    finally:
        # Its whole process group: helpers are often shell scripts, whose children would live on and hold the pipe.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _converse(process: asyncio.subprocess.Process, question: bytes) -> tuple[int, bytes]:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(question)
        await process.stdin.drain()
        process.stdin.close()
    parts: list[bytes] = []
    while part := await process.stdout.read(1 << 16):
        parts.append(part)
        if sum(map(len, parts)) > _MAX_ANSWER:
            raise AccessDenied("a credential helper said more than credentials need")
    return await process.wait(), b"".join(parts)
