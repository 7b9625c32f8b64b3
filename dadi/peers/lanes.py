"""What goes into one request to an upstream, and how many requests there are at a time. Pure; `pipe.py` sends them.

    lane       urgency               requests   of these for our own reads   where scattered
    demand     DEMAND                32         8                            the same, of at most a MiB each
    startup    STARTUP               6          1                            2, of at most 3 MiB
    rest       PREFETCH, BACKFILL    2          0                            the same, of at most a MiB each

What a sender has put into connections of the other lanes is what demand has to get past; fewer for a startup trace,
whose chunks are far from one another, would cost a round trip for each few of them. Only neighbours go into one
request, until an upstream has shown that it takes *scattered* ones: the same bytes in fewer requests. Each request, and
each sign of life in it, costs as much as a good part of a chunk, at each link of a chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dadi.blobs.source import Urgency
from dadi.index.chunks import Blob

_RUN = 1 << 20
_MOST_WAITING = 8
"""Requests that wait at the upstream put nothing in anybody's way: up to so many do not count."""


class Wish:
    """One chunk that somebody wants. `hops`: how many nodes the wish has come through."""

    __slots__ = ("blob", "chunk", "hops", "urgency")

    def __init__(self, blob: Blob, chunk: int, urgency: Urgency, hops: int) -> None:
        self.blob = blob
        self.chunk = chunk
        self.urgency = urgency
        self.hops = hops

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.blob!r}, chunk {self.chunk}, {self.urgency.name.lower()})"


class Lane:
    """Requests to one upstream; see the table. `scattered`: how many, of `scattered_size` bytes, where they may be."""

    __slots__ = ("most", "own", "running", "scattered", "scattered_size", "standing", "waiting")

    def __init__(self, most: int, *, own: int, scattered: int = 0, scattered_size: int = _RUN) -> None:
        self.most = most
        self.own = own
        self.scattered = scattered
        self.scattered_size = scattered_size
        self.running = 0
        self.waiting = 0
        """Those of them that wait at the upstream."""
        self.standing: dict[Wish, None] = {}
        """Wishes in the queue of whom it was said that they wait."""

    def full(self, *, scattered: bool, for_others: bool = False) -> bool:
        """Say whether another request has to wait, one that is scattered, and for others only."""
        spare = self.own if for_others else 0
        if scattered and self.scattered:
            return self.running >= self.scattered - spare
        return self.running - min(self.waiting, _MOST_WAITING) >= self.most - spare


def lanes() -> dict[Urgency, Lane]:
    """Return the lanes of one upstream, in the order in which they are served."""
    rest = Lane(2, own=0)
    return {
        Urgency.DEMAND: Lane(32, own=8),
        Urgency.STARTUP: Lane(6, own=1, scattered=2, scattered_size=3 << 20),
        Urgency.PREFETCH: rest,
        Urgency.BACKFILL: rest,
    }


def for_others(run: list[Wish]) -> bool:
    """Is all of it wanted by other nodes only?"""
    return all(wish.hops for wish in run)


def runs(wishes: Iterable[Wish]) -> Iterator[list[Wish]]:
    """Return wishes as runs, those asked for first coming first."""
    by_blob: dict[tuple[str, int], dict[int, Wish]] = {}
    for wish in wishes:
        by_blob.setdefault((wish.blob.digest, wish.blob.table.chunk_size), {})[wish.chunk] = wish
    for found in by_blob.values():
        for _, run in joined([(found[chunk].blob, chunk) for chunk in sorted(found)], _RUN):
            yield [found[chunk] for chunk in run]


def put_together(found: list[list[Wish]], most: int) -> list[list[Wish]]:
    """Return runs as requests of `most` bytes at most (or one run): of one blob, all of them ours or all others'."""
    requests: list[list[Wish]] = []
    open_: dict[tuple[str, int, bool], list[Wish]] = {}
    for run in found:
        size = run[0].blob.table.chunk_size
        key = run[0].blob.digest, size, for_others(run)
        request = open_.get(key)
        if request is None or (len(request) + len(run)) * size > most:
            request = open_[key] = []
            requests.append(request)
        request.extend(run)
    return requests


def joined(chunks: list[tuple[Blob, int]], most: int) -> Iterator[tuple[Blob, range]]:
    """Yield neighbouring chunks (sorted by blob and number) as runs of at most `most` bytes, at least one chunk."""
    at = 0
    while at < len(chunks):
        blob, first = chunks[at]
        allowed = max(1, most // blob.table.chunk_size)
        end = at + 1
        while end < len(chunks) and end - at < allowed and chunks[end] == (blob, first + end - at):
            end += 1
        yield blob, range(first, first + end - at)
        at = end
