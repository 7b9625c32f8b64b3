"""Jobs that are for nodes too: which of them a node is asked to do, and what nodes tell of them.

Nodes come and ask (`GET /v1/prefetch/wanted`), every few seconds; nobody connects to a node. A node is asked only when
the superpeers have the image, so that nodes cost the registry nothing; until a day after that, or until the pin ends.
What is pinned a node is asked for until it says that it keeps it: one that was restarted has let go of it.
What nodes tell is counted, in memory: after a restart they tell again, since they are asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

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
_LOOK_AGAIN = 60.0
"""Seconds for which what a startup trace names is not looked up anew: thousands of nodes ask."""


class JobNodes:
    """See the head of this file."""

    def __init__(self, shares: Shares, clock: Callable[[], float]) -> None:
        self._shares = shares
        self._clock = clock
        self._told: dict[str, dict[str, str]] = {}
        """Job → node → what it has told last."""
        self._wishes: dict[str, tuple[float, float, Wish]] = {}
        """By job: when it had changed, until when this is good, and what nodes are asked."""
        self._asking: dict[str, float] = {}
        """Nodes, and when each has asked last."""
        self._looked = 0.0

    def is_open(self, job: Job) -> bool:
        """Whether nodes are asked to do a job."""
        until = max(job.changed + _ASKED_FOR, job.request.pin_until)
        return bool(job.request.nodes) and job.state is State.READY and self._clock() <= until

    def wishes(self, jobs: list[Job], node: str, zone: str, rack: str, have: Collection[str] = ()) -> list[Wish]:
        """Return what a node, which keeps the jobs it `have`, is asked to bring, the highest priority first."""
        found: list[Wish] = []
        for job in sorted(jobs, key=lambda job: (-job.request.priority, job.created)):
            if not self.is_open(job):
                continue
            # What it keeps may be what the tag was, until it has told of what it is now.
            is_kept = job.id in have or job.request.pin_until <= self._clock()
            if is_kept and self._told.get(job.id, {}).get(node) == "ready":
                continue
            if nodes.chosen(nodes.parse(job.request.nodes), job.id, node, zone, rack):
                found.append(self._wish(job))
                if len(found) == MOST_WISHES:
                    break
        return found

    def is_pinned(self, job: Job) -> bool:
        """Whether nodes keep what a job has brought them, whatever the job does by now.

        It may have been asked for again, and fail since the registry is away.
        """
        now = self._clock()
        return any(pin.until > now for pin in job.pins) or (self.is_open(job) and job.request.pin_until > now)

    def pinned(self, jobs: list[Job], have: Collection[str]) -> tuple[str, ...]:
        """Return which of the jobs, of which the node may hear, it is to keep still of those that it has."""
        return tuple(job.id for job in jobs if job.id in have and self.is_pinned(job))

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
        now, request = self._clock(), job.request
        changed, until, wish = self._wishes.get(job.id, (0.0, 0.0, None))
        if wish is None or changed != job.changed or not 0 <= until - now <= _LOOK_AGAIN:
            chunks = None
            if request.scope == "startup" and (named := self._shares.startup_named(job)) is not None:
                chunks = {blob.digest: tuple((run.start, run.stop) for run in runs) for blob, runs in named.items()}
            wish = Wish(job.id, str(job.pinned), request.platform, chunks, request.node_rate, request.pin_until)
            self._wishes[job.id] = (job.changed, now + _LOOK_AGAIN, wish)
        return wish

    def hear(self, job: Job, report: NodeReport) -> None:
        """Take in what a node tells of a job."""
        told = self._told.setdefault(job.id, {})
        if report.node in told or len(told) < _MOST_NODES:
            told[report.node] = report.state
        job.nodes = dict(Counter(told.values()))

    def forget(self, job: Job) -> None:
        """Begin anew with a job, or have nothing to do with it any more."""
        self._told.pop(job.id, None)
        self._wishes.pop(job.id, None)
        job.nodes = {}

    def sweep(self, job: Job) -> None:
        """Forget who has told what of a job that nodes are no longer asked to do; the counts stay in the job."""
        if job.state.is_over and not self.is_open(job):
            self._told.pop(job.id, None)
            self._wishes.pop(job.id, None)
