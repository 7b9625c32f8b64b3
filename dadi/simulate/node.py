"""A node of a simulation: asks, hedges and joins by the code of `dadi/peers`, reads as its program does.

What it does for real: `Chooser` and `Health` decide whom to ask, when to hedge and whom to leave; what they say goes
to the directory. What is left out: the bytes, the sockets, and that a peer which waits says so in a message (it is
looked up, no sooner than that message could have come).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dadi.peers.choose import Ask, Chooser
from dadi.peers.health import Health
from dadi.peers.places import Heartbeat, Peer, Place, Told
from dadi.simulate.machines import NEVER, Machine, Superpeer

if TYPE_CHECKING:
    from dadi.simulate.world import World

_AGAIN = 0.05
"""Seconds after which a read that nobody could answer is tried again."""
_NO_ANSWER = 1.0
"""Seconds after which a superpeer that says nothing to a join is given up."""
_LEFT_ALONE = 60.0


class Node(Machine):
    """See the head of this file."""

    def __init__(self, world: World, number: int, peer: Peer, rack: int, sends: float) -> None:
        super().__init__(world, peer.id, rack, sends, world.settings.nic)
        self.number = number
        self.peer = peer
        self.health = Health(world.health, trusted=world.superpeers)
        self.choosers = [Chooser(self.health, order) for order in world.owners]
        self.places: list[Place | None] = [None] * world.settings.layers
        self.bytes_at = NEVER
        """When it had the startup set."""
        self.program_at = NEVER
        """When its program had read all that it wanted, and the startup set was there."""
        self.wasted_bytes = 0
        """That came a second time, or were wrong."""
        self._missing = world.runs
        self._asking: dict[int, Ask] = {}
        self._urgent: set[int] = set()
        self._next_bulk = 0
        self._reads = 0
        self._timer = NEVER
        self._drops = 0
        self._joining: set[int] = set()

    # ── joining ───────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Join the blobs, at the same moment as everybody else; then read."""
        for layer in range(len(self.choosers)):
            self._join(layer)
        self._read_on()

    def _join(self, layer: int) -> None:
        """Ask the directory for a (better) place; the superpeer that stands in hears first what we have."""
        world = self.world
        if layer in self._joining or not self.alive:
            return
        self._joining.add(layer)
        to = self._superpeer(layer)
        world.events.at(world.events.now + world.latency, self._join_arrives, to, layer)

    def _join_arrives(self, to: Superpeer, layer: int) -> None:
        if to.alive:
            self.world.events.at(to.work(), self._join_served, to, layer)
        else:
            self.world.events.at(self.world.events.now + _NO_ANSWER, self._join_failed, to, layer)

    def _join_served(self, to: Superpeer, layer: int) -> None:
        world = self.world
        now, directory = world.events.now, world.directories[to.name]
        for about, fault in self.health.reports():
            directory.report(self.name, about, fault, world.unix(now))
        if self.places[layer] is not None:
            directory.heartbeat(self._heartbeat(to), world.unix(now))
        place = directory.join(self.peer, world.blobs[layer], world.unix(now), self.health.unwanted(now))
        world.events.at(now + world.latency, self._joined, layer, place)

    def _join_failed(self, to: Superpeer, layer: int) -> None:
        self._joining.discard(layer)
        self.health.busy(to.name, _LEFT_ALONE, self.world.events.now)
        self._join(layer)

    def _joined(self, layer: int, place: Place) -> None:
        if self.alive:
            self._joining.discard(layer)
            self.places[layer] = place
            self.choosers[layer].learn(place)
            self._fill_window()
            if self._reads < len(self.world.reads):
                self._read_on()

    def _superpeer(self, layer: int) -> Superpeer:
        """Return the first superpeer, in the blob's order, that is not known to be away."""
        names, now = self.choosers[layer].superpeers, self.world.events.now
        return self.world.superpeers[next((name for name in names if self.health.may_ask(name, now)), names[0])]

    def heartbeat(self) -> None:
        """Tell each superpeer what we have of its blobs, every few seconds."""
        world = self.world
        if not self.alive:
            return
        now = world.events.now
        for name in dict.fromkeys(self._superpeer(layer).name for layer in range(len(self.choosers))):
            to = world.superpeers[name]
            if not to.alive:
                self.health.busy(name, _LEFT_ALONE, now)
            else:
                to.work()
                changed = world.directories[to.name].heartbeat(self._heartbeat(to), world.unix(now))
                for blob, place in changed.items():
                    world.events.at(now + 2 * world.latency, self._joined, world.blobs.index(blob), place)
        world.events.at(now + world.heartbeat, self.heartbeat)

    def _heartbeat(self, to: Superpeer) -> Heartbeat:
        told = []
        for layer, place in enumerate(self.places):
            if place is not None and self._superpeer(layer) is to:
                parents = tuple(peer.id for peer in place.parents)
                complete = not self._missing
                told.append(Told(self.world.blobs[layer], place.order, place.depth, parents, complete=complete))
        return Heartbeat(self.peer, blobs=tuple(told), liars=tuple(self.health.liars()))

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _fill_window(self) -> None:
        """Ask for bulk ahead, in order, as far as the window reaches and the places are known."""
        world = self.world
        if not world.settings.bulk:
            return
        runs, window, got, asking = world.runs, world.window, self.got, self._asking
        while len(asking) < window and self._next_bulk < runs:
            run = self._next_bulk
            if self.places[world.layer_of[run]] is None:
                return
            self._next_bulk += 1
            if got[run] == NEVER and run not in asking:
                self.need(run, False, 0)

    def _read_on(self) -> None:
        """The program reads: what is here costs nothing but its thinking, what is missing is waited for."""
        world = self.world
        if not self.alive:
            return
        while self._reads < len(world.reads):
            run = world.reads[self._reads]
            if self.got[run] == NEVER:
                if self.places[world.layer_of[run]] is not None:
                    self.need(run, True, 0)
                return
            self._reads += 1
            if world.settings.think and self._reads < len(world.reads):
                world.events.at(world.events.now + world.settings.think, self._read_on)
                return
        self._finish()

    def _finish(self) -> None:
        if not self._missing and self._reads >= len(self.world.reads) and self.program_at == NEVER:
            self.program_at = self.world.events.now
            self.world.finished(self)

    # ── asking ────────────────────────────────────────────────────────────────────────────────────────────────────

    def need(self, run: int, urgent: bool, hops: int) -> None:
        world = self.world
        ask = self._asking.get(run)
        if ask is not None:
            if urgent and run not in self._urgent:
                self._urgent.add(run)
                for a_try in ask.tries:
                    upstream = world.machines[a_try.upstream]
                    world.events.at(world.events.now + world.latency, upstream.hurried, self, run)
            return
        if not self.alive or self.got[run] != NEVER:
            return
        chooser = self.choosers[world.layer_of[run]]
        ask = chooser.begin(range(run, run + 1), world.sizes[run], world.events.now, hops)
        self._asking[run] = ask
        if urgent:
            self._urgent.add(run)
        self._send(ask.tries[0].upstream, run, urgent, hops)
        if ask.due < self._timer:
            self._wake(ask.due)

    def _send(self, upstream: str, run: int, urgent: bool, hops: int) -> None:
        world = self.world
        world.events.at(world.events.now + world.latency, world.machines[upstream].asked, self, run, urgent, hops + 1)

    def delivered(self, by: Machine, run: int, since: float) -> None:
        if not self.alive:
            return
        world = self.world
        now = world.events.now
        size = world.sizes[run]
        ask = self._asking.get(run)
        if ask is None:
            self.wasted_bytes += size
            return
        chooser = self.choosers[world.layer_of[run]]
        if by.lies:
            self.wasted_bytes += size
            self._go_on(ask, run, chooser.lied(ask, by.name, now))
        else:
            chooser.arrived(ask, by.name, now, since)
            del self._asking[run]
            self._urgent.discard(run)
            self._missing -= 1
            self.obtained(run)
            if not self._missing:
                self.bytes_at = now
            self._fill_window()
            if self._reads < len(world.reads):
                if world.reads[self._reads] == run:
                    self._read_on()
            else:
                self._finish()
        self._look_at_drops()

    def _go_on(self, ask: Ask, run: int, upstream: str | None) -> None:
        if upstream is not None:
            self._send(upstream, run, run in self._urgent, ask.hops)
        elif not ask.tries:
            del self._asking[run]
            self.world.events.at(self.world.events.now + _AGAIN, self.need, run, run in self._urgent, ask.hops)

    def _look_at_drops(self) -> None:
        if self.health.drops != self._drops:
            self._drops = self.health.drops
            self._wake(self.world.events.now)
            for layer, chooser in enumerate(self.choosers):
                if any(not self.health.may_ask(parent, self.world.events.now) for parent in chooser.parents):
                    self._join(layer)

    # ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wake(self, at: float) -> None:
        self._timer = at
        self.world.events.at(at, self._woken, at)

    def _woken(self, at: float) -> None:
        if not self.alive or at != self._timer:
            return
        self._timer = NEVER
        now = self.world.events.now
        look_again = self._signs_of_life(now)
        for chooser in self.choosers:
            for ask, upstream in chooser.due(now):
                self._send(upstream, ask.run.start, ask.run.start in self._urgent, ask.hops)
            wake_at = chooser.wake_at()
            if wake_at is not None:
                look_again = min(look_again, wake_at)
        self._look_at_drops()
        if look_again < self._timer:
            self._wake(max(look_again, now + 1e-6))

    def _signs_of_life(self, now: float) -> float:
        """Take in what upstreams have said meanwhile; returns when to look again."""
        world = self.world
        again = NEVER
        for run, ask in self._asking.items():
            chooser = self.choosers[world.layer_of[run]]
            for a_try in list(ask.tries):
                machine = world.machines[a_try.upstream]
                if not machine.alive:
                    continue
                got = machine.got[run] + world.latency
                if a_try.waiting and got <= now:
                    chooser.heard(ask, a_try.upstream, got, waiting=False)
                elif got > now:
                    silence = chooser.settings.waiting if a_try.waiting else 2 * world.latency
                    if now >= a_try.since + silence:
                        chooser.heard(ask, a_try.upstream, now, waiting=True)
                if a_try.waiting:
                    again = min(again, now + self.health.patience(ask.size))
        return again
