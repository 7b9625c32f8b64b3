"""`dadi drain`: before maintenance, until nothing depends on dadi-node."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from dadi import config
from dadi.cli import show
from dadi.cli.client import NodeClient, as_json, node_socket
from dadi.errors import ConfigError


class _Time(click.ParamType[float]):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return config.quantity(str(value), config.SECONDS)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.command(short_help="Before maintenance: make nothing depend on dadi-node.")
@click.option("--timeout", type=_Time(), default="0", metavar="TIME", help="Wait for so long at most (90s, 5m, 2h); "
              "then exit status 1, and the draining goes on. Default: as long as it takes.")  # fmt: skip
@click.option("--undo", is_flag=True, help="End the draining: the node is an ordinary one again.")
@node_socket
@as_json
def drain(timeout: float, undo: bool, node_socket: str, as_json: bool) -> None:
    """Make nothing depend on dadi-node, and wait until that is so: then it can be stopped, killed, removed.

    What mounted images lack is fetched (within backfill's rate), every device becomes a local file, other nodes are
    served no more. Until --undo or a restart of the node no image is mounted that would be lazy: containerd gets
    ordinary layers instead. Exit status 0: containers read local files now and need neither dadi-node nor dadi-keeper.
    """
    client = NodeClient(node_socket)
    if undo:
        client.call("DELETE", "/v1/drain")
        if as_json:
            click.echo("{}")
        return
    row: dict[str, Any] = {}
    with show.LongWork("draining", quiet=as_json) as progress:
        for event in client.events("POST", "/v1/drain", {"timeout": str(timeout)}):
            if event.get("event") == "drained":
                row = event
            else:
                progress.event(event)
    row.pop("event", None)
    if as_json:
        click.echo(msgspec.json.encode(row))
    else:
        click.echo(f"drained: {show.size(row['bytes'])} are local files, nothing depends on dadi-node")
