"""`python -m demo`: options, what this machine must have, and the order of setting up and clearing away."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import click

from demo.screen import Screen
from demo.story import Story, spoken
from tests.lab import images
from tests.lab.cleanup import Interrupted, Lab, leak_check, signals_as_exceptions, sweep
from tests.lab.debian import BuildFailed
from tests.lab.oci_layout import Image
from tests.lab.processes import LabFailed


def _rate(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"[0-9]+(kbit|mbit|gbit)", value):
        raise click.BadParameter("a number and kbit, mbit or gbit, such as 100mbit")
    return value


@click.command()
@click.option("--rate", default="100mbit", show_default=True, callback=_rate, help="What each link carries.")
@click.option(
    "--image",
    "kind",
    type=click.Choice(["debian", "host"]),
    default="debian",
    show_default=True,
    help="debian: debootstrap with Python and more; host: this machine's own Python, made in seconds.",
)
def main(rate: str, kind: str) -> None:
    """Show the main job: an ordinary image from an ordinary registry, started before it is there."""
    screen = Screen()
    if os.geteuid() != 0:
        screen.problem("The demo needs root: it mounts images and makes network namespaces.")
        sys.exit(1)
    sys.exit(_run(screen, rate, kind))


def _run(screen: Screen, rate: str, kind: str) -> int:
    begin = time.monotonic()
    about = f"All on this machine: hosts are network namespaces, each link carries {spoken(rate)} in each direction."
    screen.title("dadi: containers that start before their image is there", about)
    try:
        with signals_as_exceptions():
            for line in sweep(images.CACHE):
                screen.fact("cleared", f"left over by an earlier run: {line}")
            _check_machine()
            image = _image(screen, kind)
            with Lab("demo") as lab, leak_check(lab.root) as leaks:
                try:
                    Story(lab, screen, image, rate).tell()
                finally:
                    lab.close()
    except (KeyboardInterrupt, Interrupted) as error:
        screen.problem("Interrupted; everything that was started has been taken down.")
        return int(error.code) if isinstance(error, Interrupted) and error.code else 130
    except (LabFailed, BuildFailed, RuntimeError, OSError) as error:
        screen.problem(f"The demo failed: {error}")
        return 1
    screen.section("Cleared away")
    if leaks:
        screen.problem("left behind: " + "; ".join(leaks.found))
        return 1
    screen.good(f"no mount, loop device, process or namespace is left ({time.monotonic() - begin:.0f} s in all)")
    return 0


def _check_machine() -> None:
    # The machine's own containerd is not our business: the demo has one of its own.
    command = [sys.executable, "-m", "dadi.cli", "doctor", "--containerd-address", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabFailed(f"this machine lacks what dadi-node needs:\n{done.stdout}{done.stderr}")


def _image(screen: Screen, kind: str) -> Image:
    if kind == "host":
        with screen.working("making an image of this machine's Python (the first time)"):
            return images.host_python()
    steps: list[str] = []

    def report(text: str) -> None:
        steps.append(text)
        screen.fact("building", text)

    start = time.monotonic()
    image = images.debian_python(report=report)
    if steps:
        screen.fact("building", f"done in {time.monotonic() - start:.0f} s, and kept for the next time")
    return image


if __name__ == "__main__":
    main()
