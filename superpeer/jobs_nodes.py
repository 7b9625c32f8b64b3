"""Jobs that are for nodes too: which of them a node is asked to do, and what nodes tell of them.

Nodes come and ask (`GET /v1/prefetch/wanted`), every few seconds; nobody connects to a node. A node is asked only when
the superpeers have the image, so that nodes cost the registry nothing; until a day after that, or until the pin ends.
What nodes tell is counted, in memory: after a restart they tell again, since they are asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from dadi.prefetch import nodes
from dadi.prefetch.life import State
from dadi.prefetch.messages import MOST_WISHES, Job, NodeReport, Wish
from superpeer.jobs_ready import Shares

_ASKED_FOR = 86400.0
_MOST_NODES = 50_000
_SOONEST, _LATEST = 15.0, 300.0
"""Seconds between two questions of one node."""
_ASKS = 50.0
"""Questions a second that are fine."""


class JobNodes:
    """See the head of this file."""

    def __init__(self, shares: Shares, clock: Callable[[], float]) -> None:
        self._shares = shares
        self._clock = clock
        self._told: dict[str, dict[str, str]] = {}
        """Job → node → what it has told last."""
        self._asking: dict[str, float] = {}
        """Nodes, and when each has asked last."""
        self._looked = 0.0

    def wishes(self, jobs: list[Job], node: str, zone: str, rack: str) -> list[Wish]:
        """Return what a node is asked to bring, the highest priority first."""
        now = self._clock()
        found = []
        for job in sorted(jobs, key=lambda job: (-job.request.priority, job.created)):
            request = job.request
            until = max(job.changed + _ASKED_FOR, request.pin_until)
            if not request.nodes or job.state is not State.READY or now > until:
                continue
            if self._told.get(job.id, {}).get(node) == "ready":
                continue
            if nodes.chosen(nodes.parse(request.nodes), job.id, node, zone, rack):
                found.append(self._wish(job))
        return found[:MOST_WISHES]

    def asked(self, node: str) -> float:
        """Remember that a node asked; return in how many seconds it is to come again: the more nodes, the later."""
        now = self._clock()
        if node in self._asking or len(self._asking) < _MOST_NODES:
            self._asking[node] = now
        if not 0 <= now - self._looked < _SOONEST:
            self._looked = now
            self._asking = {name: at for name, at in self._asking.items() if 0 <= now - at < 2 * _LATEST}
        return min(_LATEST, max(_SOONEST, len(self._asking) / _ASKS))

    def _wish(self, job: Job) -> Wish:
        chunks = None
        if job.request.scope == "startup":
            named = self._shares.startup_named(job.request.reference, job.request.platform)
            chunks = {blob.digest: tuple((run.start, run.stop) for run in runs) for blob, runs in named.items()}
        return Wish(job.id, str(job.pinned), job.request.platform, chunks)

    def hear(self, job: Job, report: NodeReport) -> None:
        """Take in what a node tells of a job."""
        told = self._told.setdefault(job.id, {})
        if report.node in told or len(told) < _MOST_NODES:
            told[report.node] = report.state
        job.nodes = dict(Counter(told.values()))

    def forget(self, job: Job) -> None:
        """Begin anew with a job."""
        self._told.pop(job.id, None)
        job.nodes = {}
