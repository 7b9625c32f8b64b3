"""What is simulated: the datacenter, the image, the program, the faults. Bytes, bytes a second, seconds."""

from __future__ import annotations

import math

import msgspec

from dadi.errors import ConfigError


class Settings(msgspec.Struct, frozen=True):
    """One simulation. Shares are 0 to 1."""

    nodes: int = 10_000
    racks: int = 250
    zones: int = 1
    superpeers: int = 1
    nic: float = 25e9 / 8
    superpeer_nic: float = 0.0
    """0: as `nic`."""
    registry: float = 10e9 / 8
    latency: float = 0.0005
    """One way, between any two machines, with what they need to answer."""
    registry_latency: float = 0.005
    join_time: float = 0.0006
    """Processor time that a superpeer or a delegate needs for a join, a heartbeat or a report, one after the other: as
    measured, with the HTTP request around it."""
    image_size: int = 1 << 30
    startup: float = 0.1
    """The share of the image that is the startup set."""
    layers: int = 1
    """Blobs that the startup set is spread over; each has a tree and an owner of its own."""
    chunk: int = 256 << 10
    join_chunks: int = 4
    """Neighbouring chunks that are asked for together, and are simulated as one transfer: a run."""
    window: int = 16 << 20
    """Bytes of bulk that a node asks for ahead."""
    bulk: bool = True
    """Fetch the startup set in order (there is a startup trace); else the program's reads fetch it, one by one."""
    misses: int = 50
    """Runs that the program reads one after the other, in an order of its own, while the bulk comes."""
    think: float = 0.0002
    """What the program computes between two reads."""
    slots: int = 2
    far_slots: int = 1
    root_slots: int = 2
    fail: float = 0.0
    """This share of the nodes goes silent, each at a random moment of the time that it would take without faults."""
    slow: float = 0.0
    slow_to: float = 0.01
    """Slow nodes send at this share of their speed, from the start."""
    lie: float = 0.0
    """This share of the nodes sends wrong bytes."""
    superpeer_dies_at: float | None = None
    """When the owner of the first layer goes silent, for good."""
    limit: float = 600.0
    """Simulated seconds after which it is given up."""
    seed: int = 1

    @property
    def startup_size(self) -> int:
        """Bytes of the startup set."""
        return max(1, round(self.image_size * self.startup))

    @property
    def run(self) -> int:
        """Bytes of a run; the last one may be shorter."""
        return self.chunk * self.join_chunks

    @property
    def runs(self) -> int:
        return math.ceil(self.startup_size / self.run)

    @property
    def superpeer_rate(self) -> float:
        return self.superpeer_nic or self.nic

    def sizes(self) -> list[int]:
        """Return the bytes of each run."""
        return [min(self.run, self.startup_size - number * self.run) for number in range(self.runs)]

    def check(self) -> None:
        """Raise ConfigError for what cannot be simulated."""
        for name in ("nodes", "racks", "zones", "superpeers", "layers", "chunk", "join_chunks", "image_size", "nic",
                     "registry", "root_slots", "window", "limit"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be more than 0")
        for name in ("latency", "registry_latency", "join_time", "think", "misses", "slots", "far_slots"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be less than 0")
        for name in ("startup", "slow_to"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be more than 0 and at most 1 (100 %)")
        for name in ("fail", "slow", "lie"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1 (100 %)")
        if self.fail + self.slow + self.lie > 1:
            raise ConfigError("nodes that fail, are slow and lie are more than all nodes together")
        if self.superpeer_dies_at is not None and self.superpeers < 2:
            raise ConfigError("when the only superpeer dies nobody can start", hint="--superpeers 2")
        if self.nodes * self.runs > 50_000_000:
            raise ConfigError(
                f"{self.nodes} nodes × {self.runs} runs are too many transfers to simulate",
                hint="a larger --chunk or --join, or a smaller --startup",
            )
