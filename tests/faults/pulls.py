"""Plain pulls through proxies while superpeers, nodes and the proxy itself die or hang.

What is there is given, what can be brought is brought: by the stand-in, by another node. Where nobody is left who could
know, a pull fails within seconds: an engine then goes to the registry by itself. (Registries and disks: pulls_ill.py.)
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from dadi.peers import owners
from tests.faults import bad_original
from tests.faults.engines import PulledImage
from tests.faults.fleet import FLEET, Fleet, Paced, coming
from tests.faults.frame import Bounds, Case, Run
from tests.faults.scene import Daemon, Node, Superpeer, free_ports
from tests.lab.forking import Forked

SOON = 15.0
"""Seconds after which a pull that cannot be has failed: engines wait for them before they ask the registry."""
_RATE = 1_000_000


def _owner(run: Run, image: PulledImage) -> Superpeer:
    """Return who gets the largest layer of an image."""
    digest, _ = max(image.blobs, key=lambda blob: blob[1])
    url = owners.owners(digest, run.scene.urls)[0]
    return run.scene.superpeers[run.scene.urls.index(url)]


@contextlib.contextmanager
def _slowly(run: Run) -> Iterator[None]:
    """Have blobs leave the registry slowly, so that there is a middle."""
    there = run.scene.supply.door
    there.fault = Paced(_RATE)
    try:
        yield
    finally:
        there.fault = None


def _arrives(run: Run, *superpeers: Superpeer) -> Superpeer:
    """Wait until a layer is on its way to one of these; return which."""
    found: list[Superpeer] = []

    def one() -> bool:
        found[:] = [superpeer for superpeer in superpeers if coming(superpeer.directory / "state") > 100_000]
        return bool(found)

    run.wait_for(one, 30, "a layer is on its way to a superpeer")
    return found[0]


def _end(daemon: Daemon) -> None:
    """Kill it, and see it dead."""
    assert daemon.process is not None
    daemon.process.kill()


@contextlib.contextmanager
def _stopped(*victims: Daemon) -> Iterator[None]:
    """Have processes hang: their kernel answers for them, they do not."""
    for victim in victims:
        assert victim.process is not None
        victim.process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for victim in victims:
            assert victim.process is not None
            victim.process.signal(signal.SIGCONT)


def superpeers_killed(run: Run) -> int:
    """The superpeer that gets a layer, and then its only stand-in, which has gone on with it."""
    with Fleet(run) as fleet:
        images = fleet.images(run.pick(1, 20))
        with fleet.engines(fleet.behind, fleet.warm(fleet.behind)) as old:
            for image in images:
                with _slowly(run), fleet.engines(fleet.behind, [image], engines=1, once=True) as new:
                    first = _arrives(run, *run.scene.superpeers)  # who was killed a moment ago may still be passed over
                    _end(first)
                    second = _arrives(run, *(other for other in run.scene.superpeers if other is not first))
                    first.start()
                    _end(second)
                    run.scene.supply.door.fault = None
                    fleet.have(new)
                    second.start()
            run.reads_go_on()
        assert not old.lost, old.errors()
        fleet.say(images)
    return 2 * len(images)


def superpeer_hangs(run: Run) -> int:
    """While a layer is on its way to it, and for whoever asks then; the stand-in is there."""
    with Fleet(run) as fleet:
        images = fleet.images(layers=1)
        with (
            fleet.engines(fleet.behind, fleet.warm(fleet.behind)),
            _slowly(run),
            fleet.engines(fleet.behind, images, engines=1, once=True) as new,
        ):
            # Whichever it is: who was killed in the case before may still be passed over.
            victim = _arrives(run, *run.scene.superpeers)
            with _stopped(victim):
                run.scene.supply.door.fault = None
                fleet.have(new)
                run.reads_go_on(run.pick(1, 100))
            run.reads_go_on()
        fleet.say(images)
    return 1


def _nobody(run: Run, away: Callable[[], contextlib.AbstractContextManager[None]]) -> int:
    """No superpeer answers: pulls fail, soon; afterwards all is as before, with what has come by then."""
    with Fleet(run) as fleet:
        images = fleet.warm(fleet.behind, 2)
        with fleet.engines(fleet.behind, images) as old:
            run.reads_go_on()
            with away():
                run.wait_for(lambda: sum(old.reasons.values()) >= run.pick(2, 60), 60, "pulls fail")
            failed = dict(old.reasons)
            run.reads_go_on()
        assert old.longest_failure <= SOON, f"a pull failed after {old.longest_failure:.1f} s"
        assert set(failed) <= {"503 UNAVAILABLE", "cut"}, failed
        assert fleet.copies(images) < len(run.scene.superpeers) + 0.01  # who is back first stands in
        fleet.say(images)
    return len(run.scene.superpeers)


def both_killed(run: Run) -> int:
    @contextlib.contextmanager
    def away() -> Iterator[None]:
        for superpeer in run.scene.superpeers:
            _end(superpeer)
        yield
        for superpeer in run.scene.superpeers:
            superpeer.begin()
        for superpeer in run.scene.superpeers:
            superpeer.wait()

    return _nobody(run, away)


def both_hang(run: Run) -> int:
    return _nobody(run, lambda: _stopped(*run.scene.superpeers))


def proxy_killed(run: Run) -> int:
    """Proxies with and without superpeers, while blobs arrive there: clients see a cut, ask again, and have all."""
    with Fleet(run) as fleet:
        proxies, times = (fleet.through, fleet.alone), run.pick(2, 20)
        images = fleet.images(times)
        for image in images:
            with _slowly(run), fleet.engines(fleet.doors[-2:], [image], once=True) as new:
                for proxy in proxies:
                    run.wait_for(lambda proxy=proxy: coming(proxy.state) > 100_000, 30, "a blob is on its way")
                    _end(proxy)
                for proxy in proxies:
                    proxy.start()
                    assert not coming(proxy.state), "something partial has stayed"
                run.scene.supply.door.fault = None
                fleet.have(new)
            assert set(new.reasons) <= {"cut", "refused"}, new.reasons
            for proxy in proxies:  # clients have all before the store has
                run.wait_for(lambda proxy=proxy: not coming(proxy.state), 30, "nothing partial is left")
        fleet.say(images, 2)
    return len(proxies) * times


def _a_parent(run: Run, parent: Node, other: Node,
              harm: Callable[[Daemon], contextlib.AbstractContextManager[None]]) -> int:  # fmt: skip
    """One node has an image, and is who the other is sent to; then it is no good."""
    hurt = 0
    with Fleet(run) as fleet:

        def gets(images: list[PulledImage]) -> tuple[int, int]:
            """Return the bytes that a crowd at the other node has from its parent, and from superpeers."""
            with fleet.engines([fleet.node(other)], images, engines=4, once=True) as crowd:
                before = other.status()["peers"]["asking"]
                fleet.have(crowd)
            after = other.status()["peers"]["asking"]
            return tuple(after[name] - before[name] for name in ("peer_bytes", "superpeer_bytes"))

        def has() -> list[PulledImage]:
            return fleet.warm([fleet.node(parent)])

        for _ in range(run.pick(1, 3)):  # each time it is left alone for longer
            run.wait_for(lambda: gets(has())[0] > 0, 60, "one node is the other's parent")
            images = has()
            with harm(parent):
                _, instead = gets(images)
            hurt += instead > 0
            assert fleet.copies(images) < 1.01
        fleet.say(images)
    return hurt


def node_hangs(run: Run) -> int:
    return _a_parent(run, *run.scene.nodes, _stopped)


def node_killed(run: Run) -> int:
    @contextlib.contextmanager
    def killed(victim: Daemon) -> Iterator[None]:
        _end(victim)
        yield
        victim.start()

    return _a_parent(run, *run.scene.nodes[::-1], killed)


def _lying(manner: str) -> Callable[[Run], int]:
    """Return an injury: a peer that has joined a layer's tree first, and then sends this."""

    def injure(run: Run) -> int:
        told = run.scene.directory / f"pulls-{manner}"
        with Fleet(run) as fleet:
            (port,), (image,) = free_ports(1), (images := fleet.images(layers=1, size=2 << 20))
            digest, _ = max(image.blobs, key=lambda blob: blob[1])
            arguments = [manner, _owner(run, image).url, f"{image.registry}/{image.name}", digest, str(port)]
            bad = Forked(run.scene.forks, f"{run.scene.directory.name}-{run.case.name}", bad_original.__name__,
                         [*arguments, str(told)])  # fmt: skip
            bad.wait_until(told.exists)
            try:
                nodes = [fleet.node(node) for node in run.scene.nodes]
                with fleet.engines(nodes, images, engines=4, once=True) as crowd:
                    fleet.have(crowd)
            finally:
                bad.kill()
            fleet.say(images)
        return told.stat().st_size

    return injure


def _case(name: str, title: str, injure: Callable[[Run], int], bounds: Bounds, *, alone: bool = False) -> Case:
    return Case(f"pulls-{name}", f"plain pulls: {title}", injure, FLEET, bounds, layers=0, alone=alone)


_NEVER, _SOON = Bounds(longest=30), Bounds(longest=30, failed=None)
CASES = [
    # Nodes first: for whom a superpeer was away a moment ago, its stand-in is asked, and a layer is there twice.
    _case("node-hangs", "a node that gives: hangs", node_hangs, _NEVER),
    _case("node-killed", "a node that gives: kill -9", node_killed, _NEVER),
    _case("wrong", "a peer: wrong bytes", _lying("wrong"), _NEVER),
    _case("silent", "a peer: no answer", _lying("silent"), _NEVER),
    _case("proxy-killed", "the proxy: kill -9", proxy_killed, _SOON),
    _case("superpeers-killed", "superpeer, then its stand-in: kill -9", superpeers_killed, _NEVER),
    _case("superpeer-hangs", "superpeer: hangs", superpeer_hangs, _NEVER),
    _case("both-killed", "superpeer and stand-in: kill -9", both_killed, _SOON),
    _case("both-hang", "superpeer and stand-in: hang", both_hang, _SOON, alone=True),
]
