"""`python -m bench [NAME …]`: runs the benchmarks (all of them without names) and writes bench/results."""

from __future__ import annotations

import importlib
import os
import sys
import time

import click
from rich.console import Console

from bench import harness
from tests.lab import images
from tests.lab.cleanup import Interrupted, signals_as_exceptions, sweep

NAMES = ("first_line", "first_time", "containers", "indexing", "fuse_hits", "after_swap", "memory", "directory",
         "proxy", "serving", "crowd",
         "startup_trace")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--quick", is_flag=True, help="Fewer and smaller measurements; the results say so.")
def main(names: tuple[str, ...], quick: bool) -> None:
    """Measure speed and memory; tables and plots go to bench/results."""
    console = Console(highlight=False, soft_wrap=True)
    if os.geteuid() != 0:
        console.print("The benchmarks need root: they mount images and make network namespaces.")
        sys.exit(1)
    failed = False
    try:
        with signals_as_exceptions():
            sweep(images.CACHE)
            for name in names or NAMES:
                failed |= not _run(console, name, quick)
    except (KeyboardInterrupt, Interrupted):
        console.print("Interrupted; everything that was started has been taken down.")
        sys.exit(130)
    harness.summary()
    console.print(f"\nwritten to {harness.RESULTS}")
    sys.exit(1 if failed else 0)


def _run(console: Console, name: str, quick: bool) -> bool:
    """Run one benchmark; says whether it could be run to its end (not: whether targets are met)."""
    module = importlib.import_module(f"bench.{name}")
    title = (module.__doc__ or name).splitlines()[0].rstrip(".")
    console.print(f"\n{title}", style="bold", markup=False)
    bench = harness.Bench(name, title, quick=quick, console=console)
    start = time.monotonic()
    try:
        module.run(bench)
    except Exception as error:
        console.print(f"  could not be measured: {type(error).__name__}: {error}", markup=False)
        return False
    bench.write()
    console.print(f"  ({time.monotonic() - start:.0f} s)")
    return True


if __name__ == "__main__":
    main()
