"""`dadi verify`: everything on disk against its digests, through the node that runs, or in a store that nobody uses."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from dadi import config
from dadi.cli import show
from dadi.cli.client import NodeClient, as_json, node_socket
from dadi.errors import ConfigError, Conflict, InvalidRequest, NotFound, Unavailable

if TYPE_CHECKING:
    from dadi.blobs.verifying import Checked

NODE, SUPERPEER = "/var/lib/dadi/node", "/var/lib/dadi/superpeer"


class _Rate(click.ParamType[float]):
    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return config.quantity(str(value), config.RATE)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.command(short_help="Check everything on disk against its digests.")
@click.option("--repair", is_flag=True, help="Fetch at once what was thrown away (through the node that runs).")
@click.option("--state", metavar="DIR", help="Look at the store below this state directory, of a node, superpeer or "
              "proxy that does not run. Default: ask the node that runs.")  # fmt: skip
@click.option("--superpeer", is_flag=True, help=f"The same as --state {SUPERPEER}.")
@click.option("--rate", type=_Rate(), default=None, metavar="RATE",
              help="Read so much a second at most (50MiB, 1Gbit). Default: 100MiB of a node that runs, "
              "else any.")  # fmt: skip
@node_socket
@as_json
def verify(
    repair: bool, state: str | None, superpeer: bool, rate: float | None, node_socket: str, as_json: bool
) -> None:
    """Check everything on disk against its digests; throw away what is wrong. Exit status 0: all is right (again).

    Each chunk by its chunk table, whole blobs by their digests, small files by their formats. A wrong chunk is missing
    from then on: it is fetched when it is read, and no device of a node that runs gives out a byte of it.
    """
    if superpeer and state:
        raise InvalidRequest("--superpeer and --state name two directories")
    if repair and (superpeer or state):
        raise InvalidRequest("--repair is the work of a node that runs",
                             hint="leave out --state; what is thrown away comes again when it is needed")  # fmt: skip
    place = SUPERPEER if superpeer else state
    bad: list[dict[str, Any]] = []
    counts: dict[str, Any] = {}
    with show.LongWork("verifying", quiet=as_json) as progress:
        for event in _events(place, node_socket, repair, rate):
            match event.get("event"):
                case "bad":
                    bad.append(event)
                case "verified":
                    counts = event
                case _:
                    progress.event(event)
    if as_json:
        click.echo(msgspec.json.encode({**counts, "bad": bad}))
    else:
        _show(counts, bad)
    left = any(not event.get("repaired") for event in bad)
    sys.exit(1 if left else 0)


def _events(place: str | None, socket: str, repair: bool, rate: float | None) -> Iterator[dict[str, Any]]:
    if place is not None:
        yield from _offline(Path(place), rate or 0.0)
        return
    parameters = {"repair": "1" if repair else "0", "rate": str(100 << 20 if rate is None else rate)}
    events = NodeClient(socket).events("POST", "/v1/verify", parameters)
    try:
        first = next(events)
    except Unavailable as error:
        # Not the store by itself: it would be locked against a node that is only being started again.
        hint = f"start dadi-node; a store that no node is to use meanwhile: `dadi verify --state {NODE}`"
        raise Unavailable(error.message, hint=hint) from None
    yield first
    yield from events


def _offline(state: Path, rate: float) -> Iterator[dict[str, Any]]:
    from dadi.node.state_files import check
    from dadi.node.verifying import bad_blob, bad_file

    try:
        there = (state / "store" / "blobs").is_dir()
    except PermissionError as error:
        raise Unavailable(f"cannot look at {state}: {error.strerror}", hint="run as root") from None
    if not there:
        raise NotFound(f"there is no store in {state}", hint="--state names a directory like /var/lib/dadi/node")
    counts = {"blobs": 0, "bytes": 0, "bad_blobs": 0, "bad_chunks": 0, "repaired": 0, "bad_files": 0}
    with asyncio.Runner() as runner:
        events = _looked_at(state, rate)
        try:
            while (checked := runner.run(anext(events, None))) is not None:
                if isinstance(checked, dict):
                    yield checked
                    continue
                counts["blobs"] += 1
                counts["bytes"] += checked.bytes
                if checked.why:
                    counts["bad_blobs"] += 1
                    counts["bad_chunks"] += len(checked.bad)
                    yield {**bad_blob(checked), "outcome": _outcome(state, checked), "repaired": False}
        finally:
            runner.run(events.aclose())
    for damaged in check(state):
        counts["bad_files"] += 1
        yield bad_file(damaged)
    yield {"event": "verified", **counts}


def _outcome(state: Path, checked: Checked) -> str:
    from dadi.blobs.layout import BlobDirectory
    from dadi.node import loop

    data = BlobDirectory.of((state / "store").resolve(), checked.blob.digest).data
    if any(status.backing_file == str(data) for status in loop.attached()):
        return "a mounted image reads on from that file: start dadi-node, and its containers again"
    return "left as it is" if not checked.bad and data.exists() else "fetched again when it is needed"


async def _looked_at(state: Path, rate: float) -> AsyncGenerator[Any, None]:
    """Yield what `dadi.blobs.verifying` finds, and "progress" events; the store is locked meanwhile."""
    from dadi.blobs.disk import DiskBlobs
    from dadi.blobs.verifying import ReadingPace
    from dadi.blobs.verifying import verify as verified

    try:
        store = await asyncio.to_thread(DiskBlobs.of_state, state)
    except OSError as error:
        raise Unavailable(f"cannot use the store in {state}: {error.strerror}", hint="run as root") from None
    except Conflict as error:
        hint = "a node is asked by its socket, without --state; a superpeer must be stopped"
        raise Conflict(error.message, hint=hint) from None
    done = 0

    def on_bytes(length: int) -> None:
        nonlocal done
        done += length

    try:
        total = store.statistics()["bytes"]
        async for checked in verified(store, ReadingPace(rate), on_bytes):
            yield {"event": "progress", "stage": "reading the store", "bytes": done, "total": total}
            yield checked
    finally:
        await store.close()


def _show(counts: dict[str, Any], bad: list[dict[str, Any]]) -> None:
    for event in bad:
        what = event.get("blob") or event.get("file")
        click.echo(f"BAD {what}: {event['why']}; {event['outcome']}")
        if event.get("images"):
            images = ", ".join(event["images"])
            click.echo(f"    containers of {images} may have read them: restart these to be sure")
    click.echo(f"{counts['blobs']} blobs, {show.size(counts['bytes'])} were read: " + (
        "all is as its digests say" if not bad else f"{counts['bad_blobs']} blobs bad ({counts['bad_chunks']} chunks), "
        f"{counts['repaired']} repaired; {counts['bad_files']} files bad"))  # fmt: skip
