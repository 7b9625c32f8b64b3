"""gRPC servers on unix sockets that only our own user may use: the place is taken, served, and left again."""

from __future__ import annotations

import asyncio
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

from dadi.errors import Conflict

_MAX_PATH = 107
_ELSEWHERE = "`run` in the configuration chooses the directory"


class Serving:
    """A socket that is served, until `stop`."""

    def __init__(self, server: Any, path: Path) -> None:
        self._server = server
        self.path = path

    def __repr__(self) -> str:
        return f"Serving({self.path})"

    async def stop(self, grace: float = 5.0) -> None:
        """Take no more calls, let those under way finish for `grace` seconds, remove the socket."""
        await self._server.stop(grace)
        await asyncio.to_thread(self.path.unlink, missing_ok=True)


async def listen(server: Any, path: Path) -> Serving:
    """Start a grpc.aio server on a unix socket; its directory is made. Raises Conflict if the place is taken."""
    await _make_way(path)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise Conflict(f"cannot listen on {path}: {error}", hint=_ELSEWHERE) from None
    await asyncio.to_thread(os.chmod, path, 0o600)
    await server.start()
    return Serving(server, path)


async def _make_way(path: Path) -> None:
    """Remove a socket that a process left which is gone."""
    if len(os.fsencode(path)) > _MAX_PATH:
        why = f"the path of a socket has at most {_MAX_PATH} bytes"
        raise Conflict(f"cannot listen on {path}: {why}", hint=_ELSEWHERE)
    await asyncio.to_thread(partial(path.parent.mkdir, parents=True, exist_ok=True))
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except FileNotFoundError:
        return
    except OSError as error:
        status = await asyncio.to_thread(os.lstat, path)
        if not stat.S_ISSOCK(status.st_mode):
            hint = "move it away, if nobody needs it"
            raise Conflict(f"cannot listen on {path}: {error.strerror}; it is no socket", hint=hint) from None
        await asyncio.to_thread(path.unlink, missing_ok=True)
    else:
        writer.close()
        raise Conflict(f"another process listens on {path}", hint=_ELSEWHERE)
