"""`dadi mount` and `dadi umount`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from dadi.cli import show
from dadi.cli.client import NodeClient, as_json, node_socket, platform_option
from dadi.errors import Conflict, DadiError, InvalidRequest, NotFound
from dadi.node import released

_FORCED = 20.0
"""Seconds that the node has for a forced unmount before it is done without it."""


@click.command(short_help="Mount an image, read-only, at a directory.")
@click.argument("image")
@click.argument("directory", type=click.Path(file_okay=False))
@platform_option
@node_socket
@as_json
def mount(image: str, directory: str, platform: str, node_socket: str, as_json: bool) -> None:
    """Mount IMAGE read-only at DIRECTORY, which must exist, without waiting for its bytes.

    IMAGE is a reference such as registry.example/team/app:1.2 or docker.io/library/debian:12. The node fetches the
    image's metadata; file contents come when they are read, and the rest is fetched in the background.
    """
    directory = os.path.abspath(directory)
    begin = time.monotonic()
    row: dict[str, Any] = {}
    body = {"image": image, "directory": directory, "platform": platform}
    with show.LongWork(f"mounting {image}", quiet=as_json) as progress:
        for event in NodeClient(node_socket).events("POST", "/v1/mounts", body=body):
            if event.get("event") == "mounted":
                row = event
            else:
                progress.event(event)
    seconds = time.monotonic() - begin
    if as_json:
        row.pop("event", None)
        click.echo(msgspec.json.encode({**row, "seconds": round(seconds, 3)}))
    else:
        present, total = row["bytes_present"], row["bytes"]
        click.echo(f"{row['reference']} is mounted at {row['directory']} after {seconds:.2f} s: {row['state']}, "
                   f"{show.size(present)} of {show.size(total)} are here")  # fmt: skip


@click.command()
@click.argument("directory", type=click.Path())
@click.option("--force", is_flag=True, help="Also while it is in use: waiting reads fail, the mount is detached.")
@node_socket
def umount(directory: str, force: bool, node_socket: str) -> None:
    """Unmount the image at DIRECTORY. With --force also while dadi-node is dead, or does not answer.

    What was fetched stays in the node's store while there is room: mounting the image again does not fetch it again.
    """
    directory = os.path.abspath(directory)
    if not force:
        NodeClient(node_socket).call("DELETE", "/v1/mounts", {"directory": directory, "force": "0"})
        return
    try:
        NodeClient(node_socket, _FORCED).call("DELETE", "/v1/mounts", {"directory": directory, "force": "1"})
    except (NotFound, Conflict, InvalidRequest):
        raise
    except DadiError as error:  # whatever else it is: it cannot do it
        released.free(Path(node_socket).absolute().parent, directory)
        left = f"{directory} was taken away all the same; reads that wait for bytes fail when dadi-node starts"
        click.echo(f"{error.message}: {left}", err=True)
