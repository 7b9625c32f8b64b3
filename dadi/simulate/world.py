"""The datacenter that is simulated: made from the settings, run until every node that lives has what it needs.

The directories are `dadi.peers.directory.Directory`, one on each superpeer and one on each delegate of a group; owners
are those of `dadi.peers.owners`, groups those of `superpeer.groups`: they stand when it begins, as they do in a
datacenter whose nodes are up before an image comes.
Everything random comes from one generator with the given seed, so that the same settings give the same result.
"""

from __future__ import annotations

import gc
import hashlib
import random
from collections import Counter

import msgspec

from dadi.peers import directory, group, health
from dadi.peers.owners import owners
from dadi.peers.places import Peer
from dadi.simulate.bounds import bounds
from dadi.simulate.events import Events
from dadi.simulate.machines import NEVER, Machine, Registry, Superpeer
from dadi.simulate.node import Node
from dadi.simulate.settings import Settings
from superpeer.groups import HEARTBEATS_A_SECOND, Groups

_MARGIN = 0.02
_EPOCH = 1.7e9
"""Directories want Unix time; nothing depends on when it was."""


class World:
    """All machines, and what they share."""

    def __init__(self, settings: Settings) -> None:
        settings.check()
        self.settings = settings
        self.events = Events()
        self.latency, self.registry_latency = settings.latency, settings.registry_latency
        self.join_time = settings.join_time
        self.sizes = settings.sizes()
        self.runs = len(self.sizes)
        self.layer_of = [run * settings.layers // self.runs for run in range(self.runs)]
        self.window = max(1, settings.window // settings.run)
        self.into_rack: Counter[int] = Counter()
        """Bytes that came into each rack from outside."""
        self.out_of_rack: Counter[int] = Counter()
        self._random = random.Random(settings.seed)
        self.blobs = [f"sha256:{hashlib.sha256(b'layer %d' % n).hexdigest()}" for n in range(settings.layers)]
        names = [f"superpeer-{number}" for number in range(settings.superpeers)]
        self.owners = [owners(blob, names) for blob in self.blobs]
        self.registry = Registry(self, settings.registry)
        self.superpeers = {name: Superpeer(self, name, settings.superpeer_rate) for name in names}
        rules = directory.Settings(root_slots=settings.root_slots, far_slots=settings.far_slots)
        self.heartbeat = max(rules.heartbeat, settings.nodes / HEARTBEATS_A_SECOND)
        rules = msgspec.structs.replace(rules, heartbeat=self.heartbeat, expiry=3 * self.heartbeat)
        self.directories = {name: directory.Directory(rules, now=_EPOCH) for name in names}
        self.desks: dict[str, directory.Directory] = {}
        """Of delegates."""
        self._rules = rules
        # What a node would be configured with: a parent is no good below a thirty-second of the link.
        self.health = health.Settings(margin=_MARGIN, longest=_MARGIN, slowest=settings.nic / 32)
        self.reads = self._program()
        self.nodes = self._nodes()
        self._introduce()
        self.machines: dict[str, Machine] = {m.name: m for m in (*self.superpeers.values(), *self.nodes)}
        self._unfinished = len(self.nodes)

    def __repr__(self) -> str:
        return f"World({len(self.nodes)} nodes, {self._unfinished} unfinished, at {self.events.now:.3f} s)"

    def desk(self, name: str) -> directory.Directory:
        """Return the directory of a node as a delegate."""
        if name not in self.desks:
            rules = msgspec.structs.replace(self._rules, root_slots=1)
            self.desks[name] = directory.Directory(rules, now=_EPOCH)
        return self.desks[name]

    def unix(self, now: float) -> float:
        """Return Unix time."""
        return _EPOCH + now

    def count_crossing(self, by: Machine, to: Machine, size: int) -> None:
        """A run went from one machine to another: count it if it left or entered a rack."""
        if by.rack != to.rack:
            if by.rack is not None:
                self.out_of_rack[by.rack] += size
            if to.rack is not None:
                self.into_rack[to.rack] += size

    def finished(self, node: Node) -> None:
        """A node has all that it wanted, or will never have it; when that holds for all, it is over."""
        self._unfinished -= 1
        self.events.over = self._unfinished == 0

    def run(self) -> None:
        """Let it happen. The garbage collector rests meanwhile: all there is lives until the end."""
        starting = list(self.nodes)
        self._random.shuffle(starting)
        for node in starting:
            self.events.at(0.0, node.start)
            self.events.at(self._random.uniform(0, self.heartbeat), node.heartbeat)
            self.events.at(self._random.uniform(0, self.heartbeat), node.introduce)
        self._plan_faults()
        collecting = gc.isenabled()
        gc.disable()
        try:
            self.events.run(self.settings.limit)
        finally:
            if collecting:
                gc.enable()

    def _program(self) -> list[int]:
        """Return the runs that the program waits for, in order: the same on every node."""
        if not self.settings.bulk:
            return list(range(self.runs))
        return self._random.sample(range(self.runs), min(self.settings.misses, self.runs))

    def _nodes(self) -> list[Node]:
        s = self.settings
        nodes = []
        for number in range(s.nodes):
            rack = number * s.racks // s.nodes if s.nodes >= s.racks else number
            address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:7071"
            peer = Peer(f"node-{number}", address, f"zone-{rack * s.zones // s.racks}", f"rack-{rack}", s.slots)
            nodes.append(Node(self, number, peer, rack, s.nic))
        picked = self._random.sample(nodes, len(nodes))
        failing, slow = round(s.fail * s.nodes), round(s.slow * s.nodes)
        self.failing = picked[:failing]
        for node in picked[failing : failing + slow]:
            node.sends *= s.slow_to
        for node in picked[failing + slow : failing + slow + round(s.lie * s.nodes)]:
            node.lies = True
        return nodes

    def _introduce(self) -> None:
        groups = Groups()
        for node in self.nodes:
            groups.introduce(group.outward(node.peer), 0, _EPOCH)
        for node in self.nodes:
            node.group.learn(*groups.introduce(group.outward(node.peer), 0, _EPOCH))

    def _plan_faults(self) -> None:
        # Twice the floor is about what it takes; nobody should know when all is over.
        until = 2 * bounds(self.settings).floor + self.settings.nodes * self.settings.join_time
        for node in self.failing:
            self.events.at(self._random.uniform(0, until), self._dies, node)
        if self.settings.superpeer_dies_at is not None:
            self.events.at(self.settings.superpeer_dies_at, self.superpeers[self.owners[0][0]].die)

    def _dies(self, node: Node) -> None:
        if node.program_at == NEVER:
            self.finished(node)
        node.die()
