"""How the command line talks to the node: over its control socket; and how it reports what went wrong."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import aiohttp
import click
import msgspec

from dadi import http
from dadi.errors import Unavailable

DEFAULT_SOCKET = "/run/dadi/node.sock"


class NodeClient:
    """The node behind the socket at `path`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> NodeClient:
        # A mount may wait long for an index that is being made: no limit between events beyond what the node has.
        self._session = http.client(unix_socket=self.path, read=600.0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._session:
            await self._session.close()

    async def call(self, method: str, path: str, **options: Any) -> Any:
        """Return the JSON that the node answers; raise its error, or Unavailable if there is no node."""
        async with self._request(method, path, **options) as response:
            return msgspec.json.decode(await response.read())

    async def events(self, method: str, path: str, **options: Any) -> AsyncIterator[http.Event]:
        """Yield the events of long work, without the last "done"."""
        async with self._request(method, path, **options) as response:
            async for event in http.events(response):
                if event.get("event") != "done":
                    yield event

    def _request(self, method: str, path: str, **options: Any) -> Any:
        assert self._session is not None
        return _explained(http.request(self._session, method, f"http://node{path}", "asking the node", **options), self)


class _explained:
    """Say which socket it was, and what to do, when there is no node behind it."""

    def __init__(self, request: Any, client: NodeClient) -> None:
        self._request = request
        self._client = client

    async def __aenter__(self) -> Any:
        try:
            return await self._request.__aenter__()
        except Unavailable as error:
            if "cannot connect" not in error.message:
                raise
            hint = "start dadi-node, or name its socket with --node-socket or DADI_NODE_SOCKET"
            raise Unavailable(f"no node answers on {self._client.path}", hint=hint) from None

    async def __aexit__(self, *exc: Any) -> Any:
        return await self._request.__aexit__(*exc)


def run(work: Coroutine[Any, Any, int | None]) -> None:
    """Run a verb; exit with what it returns (None: 0)."""
    sys.exit(asyncio.run(work) or 0)


node_socket = click.option(
    "--node-socket",
    envvar="DADI_NODE_SOCKET",
    default=DEFAULT_SOCKET,
    show_default=True,
    metavar="PATH",
    help="The node's control socket (also DADI_NODE_SOCKET).",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output: JSON on standard output.")
platform_option = click.option(
    "--platform", default="", metavar="OS/ARCH", help="For an image of several platforms; default: the node's own."
)
