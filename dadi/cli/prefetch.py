"""`dadi prefetch`: bring images to datacenters before they are wanted, see how that goes, prove that it is done.

    dadi prefetch IMAGE…            what follows is no verb of the group: `start` is meant
    dadi prefetch status|list|cancel|retry|verify …

Exit status 0 means what was asked for: images proven to be ready (with --detach: jobs taken by every superpeer and not
refused by now); 1 anything else, and what that is. Where `--scope startup` knows no trace, all of the image is brought
and proven, which is said: 0 then means no less.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from dadi import config
from dadi.cli import prefetch_jobs, prefetch_show
from dadi.cli.client import as_json
from dadi.cli.prefetch_jobs import converse
from dadi.cli.prefetch_show import Board, Row
from dadi.cli.prefetch_where import Where, images, platforms, where, where_options
from dadi.cli.prefetch_who import Who, who_options
from dadi.errors import DadiError, InvalidRequest
from dadi.prefetch.life import State
from dadi.prefetch.messages import (
    HIGHEST,
    LOWEST,
    USUAL,
    Job,
    Readiness,
    Request,
    Scope,
    batch_of,
    canonical,
)
from dadi.prefetch.when import moment

if TYPE_CHECKING:
    from dadi.cli.prefetch_talk import Talk

F = TypeVar("F", bound=Callable[..., Any])
_GIVEN_AGAIN = 5
"""How often a job is given its credentials again."""
_SETTLED = {State.QUEUED, State.RESOLVING}


class _Group(click.Group):
    """A group whose verb may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["start", *args]
        return super().parse_args(ctx, args)


class _Moment(click.ParamType[float]):
    """Text such as 2026-11-10T22:00+08:00 or +2h; gives seconds since 1970."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return moment(value, time.time()) if isinstance(value, str) else float(value)


class _Rate(click.ParamType[float]):
    """Text such as 2Gbit; gives bytes per second."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return config.quantity(value, config.RATE) if isinstance(value, str) else float(value)


def _image_options(command: F) -> F:
    for option in (
        click.option("--scope", type=click.Choice(["startup", "full"]), default="full", show_default=True, help=(
            "startup: what a container reads at its start, by its trace (without one everything); full: everything.")),
        click.option("--platform", "platform", multiple=True, metavar="OS/ARCH", help=(
            "For images of several platforms (may be given several times). Default: this machine's.")),
        click.option("--from-kubernetes", "-f", multiple=True, metavar="FILE", help=(
            "The images in Kubernetes manifests, YAML or JSON; - is standard input.")),
        click.option("--from-file", multiple=True, metavar="FILE", help="A list of images, one a line."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group(cls=_Group, short_help="Bring images to superpeers before a peak.")
def prefetch() -> None:
    """Bring images to superpeers before they are wanted, and prove that they are there.

    `dadi prefetch IMAGE…` is short for `dadi prefetch start IMAGE…`.
    """


@prefetch.command()
@click.argument("image", nargs=-1)
@_image_options
@where_options
@who_options
@click.option("--rate", type=_Rate(), default=0.0, metavar="RATE", help=(
    "What a datacenter may take from the registry for all these images together, such as 2Gbit. Default: no limit."))
@click.option("--at", type=_Moment(), default=0.0, metavar="TIME", help=(
    "When to begin: 2026-11-10T22:00+08:00, or +2h. The image is looked up, and all is checked, at once."))
@click.option("--deadline", type=_Moment(), default=0.0, metavar="TIME", help=(
    "When it must be done; if --rate does not do, that is said at once."))
@click.option("--priority", type=click.IntRange(LOWEST, HIGHEST), default=USUAL, show_default=True, help=(
    "Of jobs that run at the same time: the higher goes first."))
@click.option("--pin-until", type=_Moment(), default=0.0, metavar="TIME", help=(
    "Do not evict it before that time, nor on nodes that --nodes names."))
@click.option("--nodes", default="", metavar="WHICH", help=(
    "Have nodes bring it too, once the superpeers have it: all, 20%, zone=a,rack=r7. It is not waited for."))
@click.option("--node-rate", type=_Rate(), default=0.0, metavar="RATE", help=(
    "What each of these nodes may take, such as 200Mbit. Default: no limit."))
@click.option("--wait/--detach", "wait", default=True, help=(
    "Wait until it is done (the default), or only until the superpeers have taken and checked the jobs."))
@as_json
def start(
    image: tuple[str, ...],
    from_file: tuple[str, ...],
    from_kubernetes: tuple[str, ...],
    platform: tuple[str, ...],
    scope: Scope,
    superpeers: tuple[str, ...],
    datacenters: tuple[str, ...],
    everywhere: bool,
    datacenters_file: str,
    rate: float,
    at: float,
    deadline: float,
    priority: int,
    pin_until: float,
    nodes: str,
    node_rate: float,
    wait: bool,
    as_json: bool,
    who: Who,
) -> None:
    """Bring IMAGEs to superpeers, and wait until they are proven to be there.

    Jobs are the superpeers': they go on when this command is broken off. The same image asked for again is the same
    job. Registry credentials (Docker's configuration, or --username) go with a job: superpeers fetch with them, or
    with their own, and keep them in memory only, until it is done.
    """
    if 0 < pin_until <= time.time():
        raise InvalidRequest("--pin-until is a moment that has gone", hint="it takes a date and offset, or +30d")
    if node_rate and not nodes:
        raise InvalidRequest("--node-rate without --nodes has no effect", hint="--nodes all")
    whom = where(superpeers, datacenters, everywhere, datacenters_file)
    meant = [(name, on) for name in images(image, from_file, from_kubernetes) for on in platforms(platform)]
    requests = [canonical(Request(name, on, scope=scope, rate=rate, at=at, deadline=deadline, priority=priority,
                                  pin_until=pin_until, nodes=nodes, node_rate=node_rate))
                for name, on in meant]  # fmt: skip
    batch = batch_of(secrets.token_hex(8), requests)  # the rate, a deadline and the room are for all of them together
    rows = [Row(msgspec.structs.replace(each, batch=batch), place) for each in requests for place in whom.places]
    with Board(quiet=as_json) as board:
        _run(whom, who, rows, lambda talk: _start(talk, rows, board, wait=wait))
    if as_json:
        click.echo(msgspec.json.encode([row.fields() for row in rows]))
    else:
        prefetch_show.results(rows, detached=not wait)
    sys.exit(any(row.problems for row in rows))


async def _start(talk: Talk, rows: Sequence[Row], board: Board, *, wait: bool) -> None:
    def enough(job: Job) -> bool:
        # What is tried again later was taken, too.
        return job.state.is_over if wait else job.state not in _SETTLED or job.tries > 0

    async def one(row: Row, url: str) -> None:
        def told(job: Job) -> None:
            row.jobs[url] = job
            board.changed(row)

        try:
            told(await talk.begin(url, row.request))
            told(await talk.follow(url, row.jobs[url], told, enough))
            for _ in range(_GIVEN_AGAIN):
                if not row.jobs[url].needs_credentials or not await talk.has_credentials(row.request.reference):
                    break
                told(await talk.begin(url, row.request))  # it was restarted, and has them no more
                told(await talk.follow(url, row.jobs[url], told, enough))
        except DadiError as error:
            row.errors[url] = error
            board.changed(row)

    await asyncio.gather(*(one(row, url) for row in rows for url in row.place.urls))
    if wait:  # all at the end: what came first may have made room for what came last
        await _verify(talk, rows, lambda row, url: url in row.jobs and row.jobs[url].state is State.READY)


@prefetch.command()
@click.argument("image", nargs=-1)
@_image_options
@where_options
@who_options
@as_json
def verify(
    image: tuple[str, ...],
    from_file: tuple[str, ...],
    from_kubernetes: tuple[str, ...],
    platform: tuple[str, ...],
    scope: Scope,
    superpeers: tuple[str, ...],
    datacenters: tuple[str, ...],
    everywhere: bool,
    datacenters_file: str,
    as_json: bool,
    who: Who,
) -> None:
    """Prove that IMAGEs start without their registry: every chunk of the scope is there and verified, twice.

    All superpeers of a datacenter have to be asked. Exit status 1, and a list of what is missing, if anything is.
    """
    whom = where(superpeers, datacenters, everywhere, datacenters_file)
    rows = [Row(canonical(Request(name, on, scope=scope)), place)
            for name in images(image, from_file, from_kubernetes) for on in platforms(platform)
            for place in whom.places]  # fmt: skip
    _run(whom, who, rows, lambda talk: _verify(talk, rows))
    if as_json:
        click.echo(msgspec.json.encode([_proof(row) for row in rows]))
    for row in rows if not as_json else ():
        told = list(row.readiness.values())
        needed = sum(each.registry_requests for each in told)
        word, least = "not ready" if row.problems else "ready", " at least" if row.errors else ""
        click.echo(f"{row.name}: {word}, registry requests needed to start: {needed}{least}")
        for line in [*row.problems, *(f"note: {note}" for note in dict.fromkeys(each.note for each in told) if note)]:
            click.echo(f"  {line}")
    sys.exit(any(row.problems for row in rows))


async def _verify(talk: Talk, rows: Sequence[Row], which: Callable[[Row, str], bool] = lambda row, url: True) -> None:
    async def one(row: Row, url: str) -> None:
        request = row.request
        try:
            row.readiness[url] = await talk.verify(url, request.reference, request.platform, request.scope)
        except DadiError as error:
            row.errors[url] = error

    await asyncio.gather(*(one(row, url) for row in rows for url in row.place.urls if which(row, url)))


def _proof(row: Row) -> dict[str, Any]:
    told: dict[str, Readiness] = row.readiness
    return {
        "image": row.request.reference, "platform": row.request.platform, "scope": row.request.scope,
        "proven": row.proven, "datacenter": row.place.name, "ready": not row.problems, "problems": row.problems,
        "registry_requests": sum(each.registry_requests for each in told.values()),
        "superpeers": {url: msgspec.to_builtins(each) for url, each in told.items()},
    }  # fmt: skip


def _run(whom: Where, who: Who, about: Sequence[Row], work: Callable[[Talk], Any]) -> None:
    converse(whom, who, who.source([row.request.reference for row in about]), work)


for _command in prefetch_jobs.COMMANDS:
    prefetch.add_command(_command)
