"""What a simulation found, held against what no scheme can beat."""

from __future__ import annotations

from collections import Counter

import msgspec

from dadi.simulate.bounds import Bounds, bounds, tree_time
from dadi.simulate.machines import NEVER
from dadi.simulate.settings import Settings
from dadi.simulate.world import World


class Spread(msgspec.Struct, frozen=True):
    """A distribution; seconds, or copies of the startup set."""

    mean: float
    p50: float
    p90: float
    p99: float
    most: float


class Result(msgspec.Struct, frozen=True):
    """One simulation. Copies are bytes in units of the startup set."""

    settings: Settings
    bounds: Bounds
    floor: float
    tree: float
    """What a tree of this depth and width takes by the formula (`bounds.py`); no bound."""
    startup: Spread
    """Seconds until a node had its last startup byte; of the nodes that lived."""
    program: Spread
    """Seconds until its program had read all it wanted, too."""
    last: float
    """When the last node had its last startup byte."""
    without: int
    """Nodes that lived and did not get their bytes within the limit."""
    dead: int
    registry_copies: float
    superpeer_copies: float
    """Sent by all superpeers together."""
    superpeer_busy: float
    """Seconds of processor time for joins, heartbeats and reports, of the busiest superpeer."""
    node_busy: float
    """The same of the busiest node, as the delegate of its group."""
    outer: int
    """Places that superpeers have given; all others were given by delegates."""
    rack_copies: Spread
    """That came into a rack from outside."""
    rack_copies_out: Spread
    node_copies: Spread
    """Sent by a node."""
    wasted_copies: float
    """Received a second time, or wrong, by all nodes together."""
    hedges: int
    moves: int
    """Times that the directory gave a node another parent."""
    depth: int
    children: int
    """The most that a node had at the end, in one tree."""
    simulated: float
    events: int
    times: list[float]
    """Of `startup`, ascending."""


def simulate(settings: Settings) -> Result:
    """Run a simulation. Raises ConfigError for settings that cannot be simulated."""
    world = World(settings)
    world.run()
    return _result(world)


def _result(world: World) -> Result:
    s = world.settings
    unit = float(s.startup_size)
    living = [node for node in world.nodes if node.alive or node.program_at != NEVER]
    times = sorted(node.bytes_at for node in living if node.bytes_at != NEVER)
    depth, children = _shape(world)
    floor = bounds(s)
    racks = range(min(s.racks, s.nodes))
    return Result(
        settings=s, bounds=floor, floor=floor.floor, tree=tree_time(s, max(1, children), depth),
        startup=_spread(times), program=_spread([n.program_at for n in living if n.program_at != NEVER]),
        last=times[-1] if times else 0.0,
        without=sum(1 for node in living if node.bytes_at == NEVER), dead=len(world.nodes) - len(living),
        registry_copies=world.registry.sent_bytes / unit,
        superpeer_copies=sum(superpeer.sent_bytes for superpeer in world.superpeers.values()) / unit,
        superpeer_busy=max(superpeer.busy_seconds for superpeer in world.superpeers.values()),
        node_busy=max(node.busy_seconds for node in world.nodes),
        outer=sum(found.statistics()["joins"] for found in world.directories.values()),
        rack_copies=_spread([world.into_rack[rack] / unit for rack in racks]),
        rack_copies_out=_spread([world.out_of_rack[rack] / unit for rack in racks]),
        node_copies=_spread([node.sent_bytes / unit for node in world.nodes]),
        wasted_copies=sum(node.wasted_bytes for node in world.nodes) / unit,
        hedges=sum(chooser.hedges for node in world.nodes for chooser in node.choosers),
        moves=sum(found.moves for found in (*world.directories.values(), *world.desks.values())),
        depth=depth, children=children, simulated=world.events.now, events=world.events.count, times=times,
    )  # fmt: skip


def _shape(world: World) -> tuple[int, int]:
    """Return the depth of the deepest tree, and the most children of a node in one, by what nodes know at the end."""
    deepest = most = 0
    for layer in range(len(world.blobs)):
        parents = {node.name: place.parents[0].id for node in world.nodes if (place := node.places[layer]) and
                   place.parents}  # fmt: skip
        most = max(most, *Counter(parents.values()).values(), 0)
        depths: dict[str, int] = {}
        for node in world.nodes:
            way, at = dict[str, None](), node.name
            while at in parents and at not in depths and at not in way:
                way[at] = None
                at = parents[at]
            depth = depths.setdefault(at, 1)
            for name in reversed(way):
                depth += 1
                depths[name] = depth
            deepest = max(deepest, depths[node.name])
    return deepest, most


def _spread(values: list[float]) -> Spread:
    if not values:
        return Spread(0.0, 0.0, 0.0, 0.0, 0.0)
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Spread(sum(ordered) / len(ordered), at(0.5), at(0.9), at(0.99), ordered[-1])
