"""Plain pulls through proxies while the registry is ill, disks are full, and state is damaged.

Each time two loads: what the proxies have given before, of which no pull may fail, whatever the registry does; and an
image that nobody has, of which pulls may fail, soon, and must not as soon as the registry is well.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aiohttp import web

from tests.faults import door
from tests.faults.fleet import FLEET, Fleet, coming
from tests.faults.frame import Bounds, Case, Run
from tests.faults.scene import Daemon
from tests.lab.processes import LabFailed

_SOON = 20.0
"""Seconds after which a pull that the registry does not let be has failed."""


class _Refuses(door.Fault):
    """Every other request is answered with 429, the others with 503."""

    async def before(self, there: door.Door, request: web.Request) -> web.StreamResponse | None:
        there.hurt += 1
        status, headers = ((503, {}), (429, {"Retry-After": "1"}))[there.hurt % 2]
        return web.Response(status=status, headers=headers, text="{}")


def _ill(make: Callable[[Run], door.Fault], seconds: tuple[float, float] = (1.0, 30.0), *, ends: bool = True
         ) -> Callable[[Run], int]:  # fmt: skip
    """Return an injury: the registry is ill for some seconds (short, long); or goes on being so until all is there."""

    def injure(run: Run) -> int:
        there = run.scene.supply.door
        with Fleet(run) as fleet:
            images = fleet.images(run.pick(1, 4))
            with fleet.engines(fleet.doors, fleet.warm(fleet.doors), engines=1) as old:
                hurt, there.fault = there.hurt, make(run)
                with fleet.engines(fleet.doors, images, engines=1, once=True) as new:
                    time.sleep(run.pick(*seconds))
                    there.fault = None if ends else there.fault
                    fleet.have(new)
                # What is not ill at once (tokens that run out) may not have been met by then.
                for _ in range(10):
                    if ends or there.hurt > hurt:
                        break
                    time.sleep(0.5)
                    with fleet.engines(fleet.doors, [*images, *fleet.images()], engines=1, once=True) as more:
                        fleet.have(more)
                run.reads_go_on()
                there.fault = None
            assert not old.counts().failed, f"of what was there: {old.errors()}"
            assert new.longest_failure <= _SOON, f"a pull failed after {new.longest_failure:.1f} s"
            for state in (fleet.through.state, fleet.alone.state):
                run.wait_for(lambda state=state: not coming(state), 20, "nothing partial is left")
            fleet.say(images, 2)
        return there.hurt - hurt

    return injure


@contextlib.contextmanager
def _disk(daemon: Daemon, size: int) -> Iterator[None]:
    """Start a daemon on a disk of its own, of this size, and afterwards on what it had before."""
    state, file = daemon.directory / "state", daemon.directory / "disk"
    assert daemon.stop() == 0
    with file.open("wb") as out:
        out.truncate(size)
    _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=0", str(file))
    _run("mount", "-o", "loop", str(file), str(state))
    try:
        daemon.start()
        yield
    finally:
        daemon.stop()
        _run("umount", str(state))
        daemon.start()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabFailed(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def _filled(state: Path) -> Iterator[None]:
    """Have somebody else fill a disk to its last byte."""
    with contextlib.suppress(OSError), (state / "other").open("wb", 0) as other:
        while True:
            other.write(bytes(1 << 16))
    yield
    (state / "other").unlink()


def full(run: Run) -> int:
    """Disks with room for one image of two; and then for nothing at all."""
    with Fleet(run) as fleet, contextlib.ExitStack() as exits:
        victims: list[Daemon] = [fleet.through, fleet.alone, *run.scene.superpeers]
        for victim in victims:
            exits.enter_context(_disk(victim, 5 << 19))
        images = fleet.images(2)
        with fleet.engines(fleet.doors, images, engines=1) as engines:
            run.wait_for(lambda: engines.have_all, 60, "all have pulled all images")
            more = fleet.images()
            with contextlib.ExitStack() as filled:
                for victim in victims:
                    filled.enter_context(_filled(victim.directory / "state"))
                with fleet.engines(fleet.doors, more, engines=1, once=True) as new:
                    fleet.have(new)
                run.reads_go_on()
            run.reads_go_on()
        fleet.say([*images, *more], 2)
    return len(victims)


def damaged(run: Run) -> int:
    """Files of the state of proxies and superpeers are cut off, emptied, filled with something else, or of later."""
    hurt = 0
    with Fleet(run) as fleet:
        daemons: list[Daemon] = [fleet.through, fleet.alone, *run.scene.superpeers]
        images = fleet.warm(fleet.doors, 2)
        for turn in range(run.pick(1, 20)):
            for daemon in daemons:
                daemon.stop()
                hurt += _damage(run, daemon.directory / "state", turn)
            for daemon in daemons:
                daemon.begin()
            for daemon in daemons:
                daemon.wait()
            with fleet.engines(fleet.doors, images, engines=1) as engines:
                run.wait_for(lambda engines=engines: engines.have_all, 60, "all have pulled all images")
        fleet.say(images, 2)
    return hurt


def _damage(run: Run, state: Path, turn: int) -> int:
    # Not the data of a blob that is whole: they were verified when it became so, `dadi verify` does it again. Nor what
    # vouches for its table, which would have to be lost in the same moment as that is damaged. Nor keys.
    files = sorted(file for file in state.rglob("*") if file.is_file() and not file.is_symlink() and file.stat().st_size
                   and "keys" not in file.parts and file.name != "complete"
                   and not (file.name == "data" and file.with_name("complete").exists()))  # fmt: skip
    chosen = run.chance.sample(files, min(len(files), 8))
    for number, file in enumerate(chosen):
        data = file.read_bytes()
        how, at = ("cut", "empty", "noise", "later")[(turn + number) % 4], run.chance.randrange(len(data) + 1)
        file.write_bytes({
            "cut": data[:at], "empty": b"", "noise": data[:at] + run.chance.randbytes(64) + data[at + 64 :],
            "later": data.replace(b'"version":1', b'"version":99').replace(b"DADIBLB1", b"DADIBLB9"),
        }[how])  # fmt: skip
    (state / "store" / "running").touch()  # whoever damages it so is not somebody who stops cleanly
    return len(chosen)


def _case(name: str, title: str, injure: Callable[[Run], int], *, failed: int | None = None,
          alone: bool = False) -> Case:  # fmt: skip
    return Case(f"pulls-{name}", f"plain pulls: {title}", injure, FLEET, Bounds(longest=45, failed=failed), 0, alone)


CASES = [
    _case("429", "registry: 429 and 503", _ill(lambda run: _Refuses())),
    _case("reset", "registry: connections are reset", _ill(lambda run: door.Reset(1), ends=False)),
    _case("short", "registry: bodies are cut short", _ill(lambda run: door.Short(1), ends=False)),
    _case("flipped", "registry: one bit of a body is wrong", _ill(lambda run: door.Flipped(1), ends=False)),
    _case("tokens", "registry: tokens that expire", _ill(lambda run: door.Tokens(run.pick(0.3, 5.0)), ends=False)),
    _case("trickle", "registry: one byte a second", _ill(lambda run: door.Trickle())),
    _case("full", "disks of proxies and superpeers: full", full, failed=0),
    _case("damaged", "state of proxies and superpeers: damaged", damaged, failed=0, alone=True),
]
