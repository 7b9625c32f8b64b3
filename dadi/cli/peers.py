"""`dadi peers IMAGE`: the tree that a mounted image's blobs come down, and how this node gets on with its upstreams."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from dadi.cli import show
from dadi.cli.client import NodeClient, as_json, node_socket

_MOST_LINES = 200


@click.command(short_help="Show who gets an image's blobs from whom.")
@click.argument("image")
@node_socket
@as_json
def peers(image: str, node_socket: str, as_json: bool) -> None:
    """Show who gets IMAGE's blobs from whom, and rates and health of the upstreams that this node asks.

    The tree of each blob comes from the superpeer that keeps it, and of this node's rack from the mate that places its
    nodes; of other racks only the nodes are shown that the superpeer has placed. "*" marks this node. What this node
    has seen of an upstream is good, suspect (late once), dropped (left alone for a while), probing, or barred (it sent
    wrong bytes).
    """
    answer = NodeClient(node_socket).call("GET", "/v1/peers", {"image": image})
    if as_json:
        click.echo(msgspec.json.encode(answer))
        return
    for blob in answer["blobs"]:
        _blob(blob, answer["id"])
    _upstreams(answer["upstreams"])
    served = answer["served"]
    if served:
        children = ", ".join(served["children"]) or "nobody"
        click.echo(f"served: {show.size(served['bytes'])}, to {children}")


def _blob(blob: dict[str, Any], me: str) -> None:
    here = show.share(blob["present_chunks"], blob["chunks"])
    click.echo(f"blob {blob['blob'][7:19]}, {show.size(blob['bytes'])}, {here} here; superpeer {blob['superpeers'][0]}")
    if blob["tree"] is None:
        click.echo("  no superpeer said who has it")
        return
    children: dict[str, list[dict[str, Any]]] = {}
    for row in blob["tree"]:
        children.setdefault(row["parent"], []).append(row)
    lines: list[str] = []
    _branch(children, "", 1, me, blob["chunks"], lines)
    click.echo("\n".join(lines[:_MOST_LINES]) or "  no node has joined it")
    if len(lines) > _MOST_LINES:
        click.echo(f"  … and {len(lines) - _MOST_LINES} more (--json has all)")


def _branch(children: dict[str, list[dict[str, Any]]], parent: str, depth: int, me: str, chunks: int,
            lines: list[str]) -> None:  # fmt: skip
    for row in sorted(children.pop(parent, ()), key=lambda row: str(row["id"])):
        share = "all" if row["complete"] else show.share(row["chunks"], chunks)
        where = "/".join(part for part in (row["zone"], row["rack"]) if part)
        state = "" if row["state"] == "fit" else f", {row['state']}"
        mark = "* " if row["id"] == me else "  "
        lines.append(f"{mark}{'  ' * depth}{row['id']} {where} {share} load {row['load']:.0%}{state}")
        _branch(children, row["id"], depth + 1, me, chunks, lines)


def _upstreams(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    table = show.table("upstream", "kind", "address", "health", "from it", "rate", "wasted")
    for row in rows:
        table.add_row(row["name"], row["kind"], row["address"] or "-", row["state"], show.size(row["bytes"]),
                      f"{show.size(row['rate'])}/s", show.size(row["wasted_bytes"]))  # fmt: skip
    show.print_table(table)
