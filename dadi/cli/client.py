"""How the command line talks to the node: HTTP over its control socket, with the standard library.

Not aiohttp: a verb waits for one answer, and importing aiohttp would take longer than the answer.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import click
import msgspec

from dadi.errors import InvalidRequest, Unavailable
from dadi.wire import Event, EventReader, error_in

DEFAULT_SOCKET = "/run/dadi/node.sock"
_LONGEST_SILENCE = 600.0
"""Seconds between two events of long work; the node sends one every quarter of a second while it indexes."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, patience: float) -> None:
        super().__init__("node", timeout=patience)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class NodeClient:
    """The node behind the socket at `path`, which may be silent for `patience` seconds."""

    def __init__(self, path: str, patience: float = _LONGEST_SILENCE) -> None:
        self.path = path
        self._patience = patience

    def call(self, method: str, path: str, parameters: dict[str, str] | None = None, body: Any = None) -> Any:
        """Return the JSON that the node answers; raise its error, or Unavailable if there is no node."""
        with self._request(method, path, parameters, body) as response:
            return msgspec.json.decode(response.read())

    def events(
        self, method: str, path: str, parameters: dict[str, str] | None = None, body: Any = None
    ) -> Iterator[Event]:
        """Yield the events of long work, without the last "done"; raise as `call` does."""
        reader = EventReader(f"the node on {self.path}")
        with self._request(method, path, parameters, body) as response:
            while not reader.done and (data := response.read1(1 << 16)):
                for event in reader.feed(data):
                    if event.get("event") != "done":
                        yield event
        reader.end()

    @contextmanager
    def _request(
        self, method: str, path: str, parameters: dict[str, str] | None, body: Any
    ) -> Iterator[http.client.HTTPResponse]:
        target = f"{path}?{urlencode(parameters)}" if parameters else path
        connection = _UnixConnection(self.path, self._patience)
        try:
            connection.request(method, target, body=None if body is None else msgspec.json.encode(body))
            response = connection.getresponse()
            if response.status >= 300:
                error = error_in(response.read())
                hint = "are dadi and dadi-node of one version? `dadi --version` and `dadi-node --version` say"
                raise error or InvalidRequest(f"the node answered {response.status} to {method} {path}", hint=hint)
            yield response
        except (FileNotFoundError, ConnectionRefusedError):
            hint = "start dadi-node, or name its socket with --node-socket or DADI_NODE_SOCKET"
            raise Unavailable(f"no node answers on {self.path}", hint=hint) from None
        except PermissionError:
            raise Unavailable(f"the node's socket {self.path} is not yours to use", hint="run as root") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"the node on {self.path} broke off: {error}", hint="look into its log") from None
        finally:
            connection.close()


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
