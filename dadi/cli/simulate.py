"""`dadi simulate`: how long the peak will take with this topology, by the real directory and peer choice."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from dadi import config
from dadi.cli import show
from dadi.cli.client import as_json

if TYPE_CHECKING:
    from dadi.simulate.result import Result, Spread


class _Quantity(click.ParamType[float]):
    """Text such as "1GiB", "25Gbit" or "0.5ms"; gives a number of bytes, bytes a second, or seconds."""

    def __init__(self, name: str, unit: str) -> None:
        self.name = name
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return config.quantity(value, self._unit) if isinstance(value, str) else float(value)


class _Share(click.ParamType[float]):
    """Text such as "10%" or "0.1"; gives 0.1."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{value!r} is no share: 10% or 0.1", param, ctx)


_SIZE, _RATE = _Quantity("size", config.SIZE), _Quantity("rate", config.RATE)
_TIME, _SHARE = _Quantity("time", config.SECONDS), _Share()

_OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("nodes", click.IntRange(min=1), 10_000, "Nodes that start the image in the same moment."),
    ("image-size", _SIZE, "1GiB", "Bytes of the image."),
    ("startup", _SHARE, "10%", "The part of the image that is read at the start."),
    ("nic", _RATE, "25Gbit", "Each node's link, each way."),
    ("superpeer-nic", _RATE, None, "A superpeer's link.  [default: as --nic]"),
    ("registry", _RATE, "10Gbit", "The link to the registry."),
    ("racks", click.IntRange(min=1), 250, "Racks that the nodes are in, equally many in each."),
    ("zones", click.IntRange(min=1), 1, "Zones that the racks are in."),
    ("superpeers", click.IntRange(min=1), 1, "Superpeers; each owns some of the layers."),
    ("layers", click.IntRange(min=1), 1, "Blobs that the startup set is spread over; each has its own tree."),
    ("chunk", _SIZE, "256KiB", "Size of a chunk."),
    ("join", click.IntRange(min=1), 4, "Neighbouring chunks in one request: simulated as one transfer."),
    ("window", _SIZE, "16MiB", "Bytes that a node asks for ahead."),
    ("slots", click.IntRange(min=1), 2, "Children that a node takes in its own rack."),
    ("far-slots", click.IntRange(min=0), 1, "Children that a node takes in other racks."),
    ("root-slots", click.IntRange(min=1), 2, "Children that the superpeer takes."),
    ("latency", _TIME, "0.5ms", "One way between two machines, with what they need to answer."),
    ("registry-latency", _TIME, "5ms", "One way to the registry."),
    ("join-time", _TIME, "0.6ms", "Processor time for each join of a layer, of whoever answers it, the superpeer or a "
     "rack's delegate, one after the other. The default was measured, with the HTTP request around it; the directory's "
     "own part is 0.02ms."),
    ("misses", click.IntRange(min=0), 50, "Reads of the program that depend on each other, besides the bulk."),
    ("think", _TIME, "0.2ms", "What the program computes between two reads."),
    ("fail", _SHARE, "0%", "Nodes that go silent for good, each at a random moment."),
    ("slow", _SHARE, "0%", "Nodes that send at --slow-to of their speed."),
    ("slow-to", _SHARE, "1%", "See --slow."),
    ("lie", _SHARE, "0%", "Nodes that send wrong bytes."),
    ("superpeer-dies-at", _TIME, None, "When the superpeer that owns the first layer goes silent for good."),
    ("limit", _TIME, "10m", "Simulated time after which it is given up."),
    ("seed", click.INT, 1, "Of everything random: the same seed gives the same result."),
)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for name, kind, default, text in reversed(_OPTIONS):
        shown = default is not None
        command = click.option(f"--{name}", type=kind, default=default, show_default=shown, help=text)(command)
    return command


@click.command(short_help="Simulate how long a peak takes.")
@_options
@click.option("--no-trace", is_flag=True, help=(
    "No startup trace: nothing is fetched ahead, the program's reads fetch the startup set one after the other."))
@click.option("--plot", metavar="FILE", type=click.Path(dir_okay=False), help="Draw it (needs matplotlib).")
@as_json
def simulate(no_trace: bool, plot: str | None, as_json: bool, **options: Any) -> None:
    """Simulate how long all nodes take to start the same image at once.

    The directory and the choice of peers are the programs' own code; links, latencies and the program that reads are
    simulated, in simulated time. A transfer is a run of --join neighbouring chunks, passed on when it is whole; a link
    sends one run after the other, demand first. Links between racks are counted, not limited; bytes are not compressed;
    a node's processor and disk cost nothing but --latency and --join-time. Nodes of a rack join by one of themselves,
    which takes one of them to the superpeer: the groups stand before, as they do where nodes are up before an image
    comes. Nodes wait for their place in the tree, however long the joins of all take: that a superpeer puts off joins
    when it has too many, and that a node reads from it meanwhile, is left out. The defaults take about two minutes of
    one core.
    """
    from dadi.simulate.plot import draw, ready
    from dadi.simulate.result import simulate as run
    from dadi.simulate.settings import Settings

    if plot:
        ready()
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("image_size", "chunk", "window"):
        given[name] = int(given[name])
    settings = Settings(join_chunks=given.pop("join"), bulk=not no_trace, **given)
    settings.check()
    if not as_json:
        click.echo(f"simulating {settings.nodes * settings.runs:,} transfers", err=True)
    began = time.monotonic()
    result = run(settings)
    if plot:
        draw(result, Path(plot))
    if as_json:
        click.echo(msgspec.json.encode(result))
    else:
        _show(result, time.monotonic() - began)
    sys.exit(1 if result.without else 0)


def _show(result: Result, seconds: float) -> None:
    s = result.settings
    click.echo(
        f"{s.nodes:,} nodes in {s.racks:,} racks, {s.zones} zones; {show.size(s.startup_size)} at start, as "
        f"{s.runs:,} runs of {s.join_chunks} chunks ({show.size(s.run)})\n"
    )
    table = show.table("", "mean", "p50", "p90", "p99", "most")
    _row(table, "until a node has its startup bytes", result.startup, _time)
    _row(table, "until its program has read them", result.program, _time)
    _row(table, "copies into a rack", result.rack_copies, _copies)
    _row(table, "copies out of a rack", result.rack_copies_out, _copies)
    _row(table, "copies sent by a node", result.node_copies, _copies)
    show.print_table(table)
    b = result.bounds
    click.echo(
        f"\nlast startup byte   {_time(result.last)}: {result.last / result.floor:.2f} times what no scheme can beat, "
        f"{_time(result.floor)}\n"
        f"  bounds            links {_time(b.receiving)}, links in runs {_time(b.relay)}, registry "
        f"{_time(b.registry)}, registry and on to all {_time(b.broadcast)}\n"
        f"  tree              {_time(result.tree)} by the formula, {result.depth} deep, up to {result.children} "
        "children a node\n"
        f"registry            {result.registry_copies:.2f} copies\n"
        f"superpeers          {result.superpeer_copies:.2f} copies sent\n"
        f"joins               {_joins(result)}\n"
        f"hedges              {result.hedges:,}, {result.moves:,} moves to another parent, "
        f"{result.wasted_copies:.2f} copies came twice or wrong\n"
        f"nodes               {result.dead:,} died, {result.without:,} lived and did not get their bytes\n"
        f"simulated           {_time(result.simulated)}, {result.events:,} events, in {seconds:.0f} s"
    )


def _joins(result: Result) -> str:
    s = result.settings
    joins = s.nodes * s.layers
    said = (
        f"{joins:,}, {result.outer:,} of them at superpeers; processor: {_time(result.superpeer_busy)} of the busiest "
        f"superpeer, {_time(result.node_busy)} of the busiest delegate"
    )
    took = max(result.outer * s.join_time / min(s.superpeers, s.layers), result.node_busy)
    if took > result.last / 2:
        said += "\n  they, and not the links, are what takes the time (see --join-time and --superpeers)"
    return said


def _row(table: Any, name: str, spread: Spread, form: Callable[[float], str]) -> None:
    table.add_row(name, *(form(value) for value in (spread.mean, spread.p50, spread.p90, spread.p99, spread.most)))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _copies(value: float) -> str:
    return f"{value:.2f}"
