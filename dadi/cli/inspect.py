"""`dadi inspect`: what an image is made of, per layer and per file."""

from __future__ import annotations

import stat
from typing import Any

import click
import msgspec

from dadi.cli import show
from dadi.cli.client import NodeClient, as_json, node_socket, platform_option

_LETTERS = {"file": "-", "directory": "d", "symlink": "l", "hardlink": "h", "character": "c", "block": "b", "fifo": "p",
            "whiteout": "w", "opaque": "o"}  # fmt: skip


@click.command(short_help="Show what an image is made of.")
@click.argument("image")
@click.option("--layers", is_flag=True, help="Show the layers (always part of --json).")
@click.option("--files", is_flag=True, help="Show each file's path, and its offset and length in the uncompressed tar.")
@platform_option
@node_socket
@as_json
def inspect(image: str, layers: bool, files: bool, platform: str, node_socket: str, as_json: bool) -> None:
    """Show what IMAGE is made of: sizes, where its index comes from, layers, files.

    The index is a "referrer" (made by `dadi index`), "converted" (by `dadi convert`), or made on "first sight" by the
    superpeer. Asks the superpeer; an image that it has not seen yet is indexed for that. With --layers each layer's
    index (with its seek points) is also shown as a share of the layer. With --files each line is: type and mode, owner,
    length, offset in the layer's uncompressed tar, path.
    """
    parameters = {"image": image, "platform": platform, "files": "1" if files else "0"}
    about: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with show.LongWork(f"inspecting {image}", quiet=as_json) as progress:
        for event in NodeClient(node_socket).events("GET", "/v1/inspect", parameters):
            kind = event.pop("event")
            if kind == "progress":
                progress.event(event)
            elif kind == "image":
                about = event
            elif kind == "layer":
                rows.append({**event, "entries": []} if files else event)
            elif kind == "files":
                rows[event["layer"]]["entries"] += event["files"]
    if as_json:
        click.echo(msgspec.json.encode({**about, "layers": rows}))
        return
    _about(about)
    if layers or files:
        _layers(rows)
    for row in rows if files else ():
        click.echo(f"\nlayer {row['number']} {row['digest']}")
        for entry in row["entries"]:
            click.echo(_line(entry))


def _about(about: dict[str, Any]) -> None:
    origin = about["index_origin"]
    if about["artifact_digest"]:
        origin += f", {about['artifact_digest']}"
    if about["signer"]:
        origin += f", signed by {about['signer']}"
    click.echo(f"{about['reference']} for {about['platform']}\n"
               f"manifest   {about['manifest_digest']}\n"
               f"layers     {about['layers']}: {show.size(about['compressed_bytes'])}, "
               f"unpacked {show.size(about['unpacked_bytes'])}\n"
               f"metadata   {show.size(about['metadata_bytes'])}, all that must be there before it starts\n"
               f"index      version {about['index_version']}, {origin}")  # fmt: skip


def _layers(rows: list[dict[str, Any]]) -> None:
    table = show.table("", "layer", "size", "unpacked", "files", "chunks", "seek points", "index", "of layer", "device")
    for row in rows:
        device = str(row["device"]) if row["device"] else "not needed"
        size, index = row["compressed_bytes"], row["index_bytes"] + row["seek_bytes"]
        table.add_row(str(row["number"]), row["digest"][7:19], show.size(size),
                      show.size(row["unpacked_bytes"]), str(row["files"]), str(row["chunks"]),
                      str(row["seek_points"] or "-"), show.size(index), f"{100 * index / max(1, size):.1f} %",
                      device)  # fmt: skip
    show.print_table(table)


def _line(entry: dict[str, Any]) -> str:
    mode = _LETTERS[entry["type"]] + stat.filemode(entry["mode"])[1:]
    offset = str(entry["offset"]) if "offset" in entry else ("sparse" if "extents" in entry else "-")
    arrow = f" -> {entry['target']}" if "target" in entry else ""
    return f"{mode} {entry['uid']}:{entry['gid']} {entry['size']:>12} {offset:>12} {entry['path'] or '.'}{arrow}"
