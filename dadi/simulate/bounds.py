"""What no scheme can beat, and what a tree should take: the arithmetic that a simulation is held against. Pure.

S bytes in M runs of c bytes, N nodes of which each sends and receives u bytes/s, a registry of r bytes/s, latency δ.
A run is passed on when it is whole (store and forward).

    receiving     S/u                                       every node's link must take it all
    registry      S/r + registry's δ                        the last byte must have left the registry
    broadcast     S/r + registry's δ + ⌈log2(N+1)⌉·c'/u + δ after that its run must still reach all nodes; those that
                                                            have it can at most double in the time of one run (c': the
                                                            last run, which may be the shortest)
    relay         (M−1+⌈log2(N+1)⌉)·c/u                     the same without a registry, for equal runs

    tree          (k·c/u)(M−1+D) + D·δ                      no bound: what a tree of depth D takes, whose nodes have k
                                                            children and send to them in turn
"""

from __future__ import annotations

import math

import msgspec

from dadi.simulate.settings import Settings


class Bounds(msgspec.Struct, frozen=True):
    """Seconds until the last node can have its last startup byte, by reason. `floor` is the highest of them."""

    receiving: float
    registry: float
    broadcast: float
    relay: float

    @property
    def floor(self) -> float:
        return max(self.receiving, self.registry, self.broadcast, self.relay)


def bounds(settings: Settings) -> Bounds:
    """Return the bounds; see the head of this file."""
    s = settings
    sizes = s.sizes()
    fastest = max(s.nic, s.superpeer_rate)
    survivors = s.nodes - round(s.nodes * s.fail)
    doublings = max(1, math.ceil(math.log2(survivors + 1)))
    registry = s.startup_size / s.registry + s.registry_latency
    return Bounds(
        receiving=s.startup_size / s.nic,
        registry=registry,
        broadcast=registry + doublings * min(sizes) / fastest + s.latency,
        relay=(sum(sizes[:-1]) + doublings * min(sizes)) / fastest if s.superpeers == 1 else 0.0,
    )


def tree_time(settings: Settings, children: int, depth: int) -> float:
    """Return what a tree of this depth takes when its busiest node has so many children."""
    s = settings
    size = min(s.run, s.startup_size)
    return children * size / s.nic * (s.runs - 1 + depth) + depth * s.latency
