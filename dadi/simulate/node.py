"""A node of a simulation: asks, hedges and joins by the code of `dadi/peers`, reads as its program does.

What it does for real: `Chooser` and `Health` decide whom to ask, when to hedge and whom to leave; what they say goes
to the directory; `Group` says which delegates are asked for a place, and what of their answer is used. What is left
out: the bytes, the sockets, and that a peer which waits says so in a message (it is looked up, no sooner than that
message could have come).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dadi.peers import group as groups
from dadi.peers.choose import Chooser
from dadi.peers.directory import Directory
from dadi.peers.group import Group
from dadi.peers.health import Health
from dadi.peers.places import Heartbeat, Peer, Place, Told
from dadi.peers.tries import Ask
from dadi.simulate.machines import NEVER, Machine, Superpeer

if TYPE_CHECKING:
    from dadi.simulate.world import World

_AGAIN = 0.05
"""Seconds after which a read that nobody could answer is tried again."""
_NO_ANSWER = 1.0
"""Seconds after which a superpeer that says nothing to a join is given up."""
_LEFT_ALONE = 60.0
_PATIENCE = 0.6
"""Seconds that a delegate has to answer (`dadi/peers/grouped.py`)."""


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
        self._unplaced: dict[int, tuple[bool, int]] = {}
        """Runs that others want, of layers that we have no place for yet: urgently?, hops."""
        self.group = Group()

    # ── joining ───────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Join the blobs, at the same moment as everybody else; then read."""
        self._join(range(len(self.choosers)))
        self._read_on()

    def introduce(self) -> None:
        """Say who we are, as a node does with each heartbeat, whatever it has joined."""
        world = self.world
        if self.alive:
            first = next((superpeer for superpeer in world.superpeers.values() if superpeer.alive), None)
            if first is not None:
                first.work()
            world.events.at(world.events.now + world.heartbeat, self.introduce)

    def _join(self, layers: Iterable[int]) -> None:
        """Ask for (better) places: delegates, or the superpeer where there are none or the place is its own."""
        blobs = self.world.blobs
        new = [layer for layer in layers if layer not in self._joining]
        if not new or not self.alive:
            return
        self._joining.update(new)
        self.group.expect(blobs[layer] for layer in new)
        asked: dict[tuple[str, ...], list[int]] = {}
        for layer in new:
            outer = self.group.has_outer_place(blobs[layer])
            asked.setdefault(() if outer else self.group.delegates(blobs[layer]), []).append(layer)
        for delegates, some in asked.items():
            self._ask_delegates(delegates, some)

    def _ask_delegates(self, delegates: Sequence[str], layers: list[int]) -> None:
        world = self.world
        now = world.events.now
        if not self.alive:
            return
        unwanted = self.health.unwanted(now)
        wanted = [delegate for delegate in delegates if delegate not in unwanted]
        if wanted:
            to, way = world.machines[wanted[0]], 0.0 if wanted[0] == self.name else world.latency
            world.events.at(now + way, self._delegate_asked, to, wanted[1:], layers, now, way)
        else:
            self._ask_superpeers(layers)

    def _delegate_asked(self, to: Machine, others: list[str], layers: list[int], since: float, way: float) -> None:
        events = self.world.events
        done = to.work(len(layers)) if to.alive else NEVER
        if done + way > since + _PATIENCE:
            self.health.busy(to.name, 1.0, since + _PATIENCE)
            events.at(since + _PATIENCE, self._ask_delegates, others, layers)
        else:
            events.at(done, self._delegate_serves, to, layers, way)

    def _delegate_serves(self, to: Machine, layers: list[int], way: float) -> None:
        world = self.world
        now, directory = world.events.now, world.desk(to.name)
        outer = []
        self._report(directory)
        for layer in layers:
            blob = world.blobs[layer]
            peer, order, unwanted = groups.outward(self.peer), self.group.order(blob), self.health.unwanted(now)
            place = directory.join(peer, blob, world.unix(now), unwanted, order)
            believed = self.group.believed(place, {}, lambda peer, shown: True)
            if believed is None:
                outer.append(layer)
            else:
                self.group.took(blob, to.name, place.order)
                world.events.at(now + way, self._joined, layer, believed)
        if outer:
            world.events.at(now + way, self._ask_superpeers, outer)

    def _ask_superpeers(self, layers: list[int]) -> None:
        world = self.world
        if not self.alive:
            return
        asked: dict[Superpeer, list[int]] = {}
        for layer in layers:
            asked.setdefault(self._superpeer(layer), []).append(layer)
        for to, some in asked.items():
            world.events.at(world.events.now + world.latency, self._join_arrives, to, some)

    def _join_arrives(self, to: Superpeer, layers: list[int]) -> None:
        if to.alive:
            self.world.events.at(to.work(len(layers)), self._join_served, to, layers)
        else:
            self.world.events.at(self.world.events.now + _NO_ANSWER, self._join_failed, to, layers)

    def _join_served(self, to: Superpeer, layers: list[int]) -> None:
        """Take the places; a superpeer that stands in hears first what we have."""
        world = self.world
        now, directory = world.events.now, world.directories[to.name]
        self._report(directory)
        if any(self.group.has_outer_place(world.blobs[layer]) for layer in layers):
            directory.heartbeat(self._heartbeat(self._at(to)), world.unix(now))
        peer = groups.outward(self.peer) if self.group.stands else self.peer
        for layer in layers:
            place = directory.join(peer, world.blobs[layer], world.unix(now), self.health.unwanted(now))
            self.group.took(world.blobs[layer], groups.SUPERPEER)
            world.events.at(now + world.latency, self._joined, layer, place)

    def _join_failed(self, to: Superpeer, layers: list[int]) -> None:
        self._joining.difference_update(layers)
        self.health.busy(to.name, _LEFT_ALONE, self.world.events.now)
        self._join(layers)

    def _joined(self, layer: int, place: Place) -> None:
        if self.alive:
            self._joining.discard(layer)
            self.places[layer] = place
            self.choosers[layer].learn(place)
            for run in [run for run in self._unplaced if self.world.layer_of[run] == layer]:
                self.need(run, *self._unplaced.pop(run))
            self._fill_window()
            if self._reads < len(self.world.reads):
                self._read_on()

    def _report(self, directory: Directory) -> None:
        for about, fault in self.health.reports():
            directory.report(self.name, about, fault, self.world.unix(self.world.events.now))

    def _superpeer(self, layer: int) -> Superpeer:
        """Return the first superpeer, in the blob's order, that is not known to be away."""
        names, now = self.choosers[layer].superpeers, self.world.events.now
        return self.world.superpeers[next((name for name in names if self.health.may_ask(name, now)), names[0])]

    def heartbeat(self) -> None:
        """Tell who gave each place what we have of its blob, every few seconds; of the superpeer's, delegates too."""
        world = self.world
        if not self.alive:
            return
        now, blobs = world.events.now, world.blobs
        placed = [layer for layer, place in enumerate(self.places) if place is not None]
        outer = [layer for layer in placed if self.group.has_outer_place(blobs[layer])]
        for name in dict.fromkeys(self._superpeer(layer).name for layer in outer):
            to = world.superpeers[name]
            if not to.alive:
                self.health.busy(name, _LEFT_ALONE, now)
            else:
                to.work()
                self._changed(world.directories[name].heartbeat(self._heartbeat(self._at(to)), world.unix(now)))
        told: dict[str, list[int]] = {}
        for layer in placed:
            hearers = (self.group.placed_by(blobs[layer]), *self.group.delegates(blobs[layer]))
            delegate = next((each for each in hearers if each and world.machines[each].alive), None)
            if delegate is not None:
                told.setdefault(delegate, []).append(layer)
        for delegate, layers in told.items():
            world.machines[delegate].work()
            beat = self._heartbeat(layers, delegate=True)
            changed = world.desk(delegate).heartbeat(beat, world.unix(now))
            inner = {blob: place for blob, place in changed.items() if not self.group.has_outer_place(blob)}
            self._changed({blob: place for blob, place in inner.items() if place.parents})
            self._ask_superpeers([blobs.index(blob) for blob, place in inner.items() if not place.parents])
        world.events.at(now + world.heartbeat, self.heartbeat)

    def _changed(self, places: dict[str, Place]) -> None:
        world = self.world
        for blob, place in places.items():
            world.events.at(world.events.now + 2 * world.latency, self._joined, world.blobs.index(blob), place)

    def _at(self, to: Superpeer) -> list[int]:
        """Return the layers whose places are a superpeer's."""
        return [layer for layer, blob in enumerate(self.world.blobs)
                if self.group.has_outer_place(blob) and self._superpeer(layer) is to]  # fmt: skip

    def _heartbeat(self, layers: list[int], *, delegate: bool = False) -> Heartbeat:
        """Return what is told of these layers; delegates hear of a place of the superpeer as of a root."""
        told = []
        for layer in layers:
            place, blob = self.places[layer], self.world.blobs[layer]
            if place is not None:
                root = delegate and self.group.has_outer_place(blob)
                parents = () if root else tuple(peer.id for peer in place.parents)
                complete = not self._missing
                told.append(Told(blob, place.order, 1 if root else place.depth, parents, complete=complete))
        peer = groups.outward(self.peer) if self.group.stands else self.peer
        return Heartbeat(peer, blobs=tuple(told), liars=tuple(self.health.liars()))

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
        if self.places[world.layer_of[run]] is None:  # children may ask a root that waits for the superpeer
            was_urgent, fewest = self._unplaced.get(run, (False, hops))
            self._unplaced[run] = (urgent or was_urgent, min(hops, fewest))
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
                    self._join([layer])

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
                    silence = chooser.lateness.settings.waiting if a_try.waiting else 2 * world.latency
                    if now >= a_try.since + silence:
                        chooser.heard(ask, a_try.upstream, now, waiting=True)
                if a_try.waiting:
                    again = min(again, now + self.health.patience(ask.size))
        return again
