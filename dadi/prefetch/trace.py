"""Startup traces: which chunks a container of an image reads first, in order; recorded, merged, judged. Pure.

    recording   what one node saw of one start: the chunks in the order of their first reads, with times
    trace       what the superpeer makes of the recordings of several nodes, and hands out with the image. Starts that
                read other things (another entry point) are another *group*; the most frequent group comes first
    message     what a node sends: a recording, a report on the trace that it replayed, or both
    borrowed    recordings made of a trace that was pushed beside the image (`trace_artifact.py`): where it is known how
                the image starts here, they go

    bytes        what
    0..7         magic: "DADITRC1" a trace, "DADIREC1" a message, "DADITRK1" what a superpeer keeps of an image
    8..          MessagePack: arrays of fields in the order below; deterministic

A step is [place in `blobs`, chunk, milliseconds since the first read]. What is read here may come from anybody who may
have the image: a trace that is wrong costs bandwidth, and what breaks a limit is Malformed.

    merging     recordings whose sets of chunks are alike (Jaccard index ≥ `ALIKE`, over the blobs that both nodes could
                watch) are a group; of three and more, chunks that only one has are left out; the order is by the median
                place, later the fewer have the chunk
    watching    a node sees only reads that pass through it. Of blobs that it could not watch, or not to the end, it
                says what it saw; that it did not see a chunk of them says nothing
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median_low
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from dadi.errors import Malformed
from dadi.index.chunks import MAX_CHUNK_SIZE, MIN_CHUNK_SIZE, Blob
from dadi.index.image import MAX_LAYERS
from dadi.peers.places import Digest

ALIKE = 0.5
MOST_STEPS = 16384
"""Chunks of one recording, and of one group: 4 GiB of the usual size."""
MOST_GROUPS = 4
MOST_IN_GROUP = 8
MOST_RECORDINGS = 24
MOST_REPORTS = 16
MAX_SIZE = 1 << 20
"""Bytes of a message or a trace."""
BORROWED = "registry-"
"""What the `node` of recordings begins with that were not seen here: they came with a trace from the registry."""
_ENOUGH_OWN = 3
_LATEST = (1 << 32) - 1
_MAGIC_TRACE, _MAGIC_MESSAGE, _MAGIC_KEPT = b"DADITRC1", b"DADIREC1", b"DADITRK1"

_Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
_ChunkSize = Annotated[int, Meta(ge=MIN_CHUNK_SIZE, le=MAX_CHUNK_SIZE)]
_Blobs = Annotated[tuple[tuple[Digest, _ChunkSize], ...], Meta(max_length=MAX_LAYERS)]
_Steps = Annotated[tuple[tuple[_Count, _Count, _Count], ...], Meta(max_length=MOST_STEPS)]
_Name = Annotated[str, Meta(max_length=128)]
Chunk = tuple[str, int]
"""A blob's digest and the number of a chunk of it."""


class Recording(msgspec.Struct, frozen=True, array_like=True):
    """One start on the node `node`. `blobs`: those that it could watch (with their chunk sizes), read or not.

    `partial`: places of those in `blobs` that could be watched at first only: what is not in `steps` was perhaps read.
    """

    node: _Name
    blobs: _Blobs
    steps: _Steps
    partial: Annotated[tuple[_Count, ...], Meta(max_length=MAX_LAYERS)] = ()

    def chunks(self) -> list[Chunk]:
        """Return the chunks in order."""
        return [(self.blobs[blob][0], chunk) for blob, chunk, _ in self.steps]

    def watched(self) -> set[str]:
        """Return the digests of the blobs of which all that was read is in `steps`."""
        return {digest for place, (digest, _) in enumerate(self.blobs) if place not in self.partial}


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What became of a replay: of its `chunks`, `used` were read; `read` in all were read in that start."""

    trace: _Name
    chunks: _Count
    used: _Count
    read: _Count


class Message(msgspec.Struct, frozen=True, array_like=True):
    """What is sent to a superpeer. `forwarded`: by another superpeer, and not to be sent on."""

    manifest: Digest
    recording: Recording | None = None
    report: Report | None = None
    forwarded: bool = False


class StartGroup(msgspec.Struct, frozen=True, array_like=True):
    """One way in which the image is started, as `recordings` starts saw it."""

    recordings: _Count
    steps: _Steps


class Trace(msgspec.Struct, frozen=True, array_like=True):
    """What is handed out with an image."""

    manifest: Digest
    blobs: _Blobs
    groups: Annotated[tuple[StartGroup, ...], Meta(max_length=MOST_GROUPS)]

    def chunks(self, group: StartGroup) -> list[Chunk]:
        """Return a group's chunks in order."""
        return [(self.blobs[blob][0], chunk) for blob, chunk, _ in group.steps]


class KeptTrace(msgspec.Struct, frozen=True, array_like=True):
    """What a superpeer keeps of an image on disk, the newest last. `dropped`: how often its trace was found useless."""

    manifest: Digest
    recordings: Annotated[tuple[Recording, ...], Meta(max_length=MOST_RECORDINGS)] = ()
    reports: Annotated[tuple[Report, ...], Meta(max_length=MOST_REPORTS)] = ()
    dropped: _Count = 0


class Given(NamedTuple):
    """What a node gets when it asks. `data`: an encoded trace, or b""; `wanted`: whether to tell what it will see."""

    data: bytes
    wanted: bool


T = TypeVar("T", Trace, Message, KeptTrace)
_encoder = msgspec.msgpack.Encoder()


def encode(thing: Trace | Message | KeptTrace) -> bytes:
    """Return the bytes; deterministic."""
    return _magic(type(thing)) + _encoder.encode(thing)


def decode(data: bytes | bytearray, kind: type[T]) -> T:
    """Return a Trace, a Message or a KeptTrace; raise Malformed for what is none, or contradicts itself."""
    magic = _magic(kind)
    if data[: len(magic)] != magic:
        raise Malformed(f"no startup {kind.__name__.lower()}: wrong magic")
    try:
        thing = msgspec.msgpack.decode(memoryview(data)[len(magic) :], type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"no startup {kind.__name__.lower()}: {error}"[:300]) from None
    return check(thing)


def check(thing: T) -> T:
    """Return what was given; raise Malformed if its parts do not fit each other."""
    if isinstance(thing, Trace):
        parts: list[tuple[_Blobs, _Steps]] = [(thing.blobs, ()), *((thing.blobs, g.steps) for g in thing.groups)]
    elif isinstance(thing, KeptTrace):
        parts = [_parts(recording) for recording in thing.recordings]
    else:
        parts = [_parts(thing.recording)] if thing.recording else []
    for blobs, steps in parts:
        if any(blob >= len(blobs) for blob, _, _ in steps):
            raise Malformed("a startup trace with a step in a blob that it does not name")
        if len({(blob, chunk) for blob, chunk, _ in steps}) != len(steps):
            raise Malformed("a startup trace that names a chunk twice")
        if len({digest for digest, _ in blobs}) != len(blobs):
            raise Malformed("a startup trace that names a blob twice")
    return thing


def _parts(recording: Recording) -> tuple[_Blobs, _Steps]:
    if any(place >= len(recording.blobs) for place in recording.partial):
        raise Malformed("a startup recording of a blob that it does not name")
    return recording.blobs, recording.steps


def _magic(kind: type[Trace | Message | KeptTrace]) -> bytes:
    return {Trace: _MAGIC_TRACE, Message: _MAGIC_MESSAGE}.get(kind, _MAGIC_KEPT)


def name_of(data: bytes) -> str:
    """Return what an encoded trace is called in reports."""
    return hashlib.sha256(data).hexdigest()[:16]


def check_fits(recording: Recording, blobs: Mapping[str, Blob]) -> None:
    """Raise Malformed unless everything that is recorded is in these blobs."""
    counts = []
    for digest, chunk_size in recording.blobs:
        blob = blobs.get(digest)
        if blob is None or blob.table.chunk_size != chunk_size:
            raise Malformed(f"a recording of {digest}, which the image does not have in chunks of {chunk_size} bytes")
        counts.append(blob.table.count)
    if any(chunk >= counts[blob] for blob, chunk, _ in recording.steps):
        raise Malformed("a recording with a chunk that the image does not have")


def ratio(reports: Iterable[Report]) -> float | None:
    """Return which share of what was fetched ahead was read; None if nothing was."""
    reports = list(reports)
    chunks = sum(report.chunks for report in reports)
    return sum(min(report.used, report.chunks) for report in reports) / chunks if chunks else None


# ---- merging


def added(kept: KeptTrace, recording: Recording) -> KeptTrace:
    """Return what is kept, with one more recording; of each node and group the newest stays, and so many in all.

    What was borrowed of a group goes when there are `_ENOUGH_OWN` starts of our own that are like it. What a node could
    not watch this time stays as it saw it before (beside the new one, if nothing says how their clocks stand to each
    other), and what few could watch stays when a group is full.
    """
    groups = _grouped([recording, *kept.recordings])
    mine = next(group for group in groups if any(each is recording for each in group))
    others = [each for each in mine if each is not recording]
    older = {id(each) for each in others if each.node == recording.node}
    gone: set[int] = set()
    borrowed = {id(each) for each in mine if is_borrowed(each)}
    for each in reversed(kept.recordings):
        if id(each) in older and (completed := _completed(recording, each)):
            recording = completed
            gone.add(id(each))
    fresh = [each for each in kept.recordings if any(each is other for other in others) and id(each) not in gone]
    while len(fresh) >= MOST_IN_GROUP:
        gone.add(id(out := _least(fresh, recording)))
        fresh = [each for each in fresh if each is not out]
    if len(mine) - len(borrowed) >= _ENOUGH_OWN:
        gone |= borrowed
    left = [each for each in kept.recordings if id(each) not in gone]
    return msgspec.structs.replace(kept, recordings=(*left, recording)[-MOST_RECORDINGS:])


def _completed(recording: Recording, older: Recording) -> Recording | None:
    """Return a recording, with what an older one of the same node and way to start says of blobs it did not watch.

    None if they have no chunk in common: what was read between what would be made up, and be taken for seen.
    """
    added = older.watched() - recording.watched()
    blobs = tuple(sorted({pair for pair in older.blobs if pair[0] in added} | set(recording.blobs)))
    if not added or len(blobs) > MAX_LAYERS or len(dict(blobs)) < len(blobs):  # or in chunks of two sizes
        return recording
    places = {digest: place for place, (digest, _) in enumerate(blobs)}
    before = {chunk: step[2] for chunk, step in zip(older.chunks(), older.steps, strict=True)}
    news = [(chunk, step[2]) for chunk, step in zip(recording.chunks(), recording.steps, strict=True)]
    # Its clock began with the first read that it saw; which was not the first one of all.
    late = next((at - seen for chunk, seen in news if (at := before.get(chunk)) is not None), None)
    if late is None:
        return None
    rows = [(chunk, at) for chunk, at in before.items() if chunk[0] in added]
    rows += [(chunk, at + late) for chunk, at in news if chunk[0] not in added]
    rows.sort(key=lambda row: row[1])
    steps = tuple((places[digest], chunk, min(at - rows[0][1], _LATEST)) for (digest, chunk), at in rows[:MOST_STEPS])
    whole = recording.watched() | added
    return Recording(recording.node, blobs, steps, tuple(places[each] for each, _ in blobs if each not in whole))


def _least(group: Sequence[Recording], new: Recording) -> Recording:
    """Return the recording, of those (the oldest first) that are to stay beside a new one, that is needed least.

    Never the newest of those that watched most: the order of all is theirs (`_group`).
    """
    watchers = Counter(digest for each in (*group, new) for digest in each.watched())
    widest = max((new, *reversed(group)), key=lambda each: len(each.watched()))
    group = [each for each in group if each is not widest]
    for each in group:
        if all(watchers[digest] > MOST_IN_GROUP // 2 for digest in each.watched()):
            return each
    return min(group, key=lambda each: len(each.watched()))


def merged(kept: KeptTrace) -> Trace | None:
    """Return the trace of what is kept; None if there is nothing to replay."""
    blobs = sorted({pair for recording in kept.recordings for pair in recording.blobs})
    places = {digest: place for place, (digest, _) in enumerate(blobs)}
    if len(places) != len(blobs) or len(blobs) > MAX_LAYERS:
        # Nodes that had the image in chunks of two sizes: of the last one is what counts.
        return merged(msgspec.structs.replace(kept, recordings=kept.recordings[-1:]))
    # What was seen here comes before what somebody else says.
    groups = [(all(map(is_borrowed, group)), _group(group, places)) for group in _grouped(kept.recordings)]
    order = sorted((found for found in groups if found[1].steps), key=lambda f: (f[0], -f[1].recordings, f[1].steps))
    return Trace(kept.manifest, tuple(blobs), tuple(group for _, group in order[:MOST_GROUPS])) if order else None


def borrowed(found: Trace) -> list[Recording]:
    """Return what would have given a trace that is not of our own learning: a recording for each of its groups."""
    return [Recording(f"{BORROWED}{place}", found.blobs, group.steps) for place, group in enumerate(found.groups)]


def is_borrowed(recording: Recording) -> bool:
    """Say whether it came with a trace from the registry."""
    return recording.node.startswith(BORROWED)


class _Seen(NamedTuple):
    recording: Recording
    chunks: set[Chunk]
    watched: set[str]
    partial: set[str]


def _grouped(recordings: Sequence[Recording]) -> list[list[Recording]]:
    """Return recordings in groups of those that are alike; whatever the order they came in, the groups are the same."""
    groups: list[list[_Seen]] = []
    for recording in sorted(recordings, key=lambda each: (-len(each.steps), each.steps, each.node)):
        watched = recording.watched()
        this = _Seen(recording, set(recording.chunks()), watched, {digest for digest, _ in recording.blobs} - watched)
        best, at = ALIKE, -1
        for place, group in enumerate(groups):
            alike = sum(_alike(this, other) for other in group) / len(group)
            if alike > best or (alike == best and at < 0):
                best, at = alike, place
        if at < 0:
            groups.append([])
        groups[at].append(this)
    return [[seen.recording for seen in group] for group in groups]


def _alike(one: _Seen, other: _Seen) -> float:
    """Return how alike two starts are: in the blobs that both watched, and what was seen of those watched in part."""
    if one.watched == other.watched and not one.partial and not other.partial:
        same, union = len(one.chunks & other.chunks), len(one.chunks | other.chunks)
        return same / union if union else 1.0
    both = one.watched & other.watched
    mine, others = ({chunk for chunk in each.chunks if chunk[0] in both} for each in (one, other))
    same, union = len(mine & others), len(mine | others)
    for short, whole in ((one, other), (other, one)):
        begun = short.partial & whole.watched
        seen = {chunk for chunk in short.chunks if chunk[0] in begun}
        same, union = same + len(seen & whole.chunks), union + len(seen)
    return same / union if union else 1.0


def _group(recordings: Sequence[Recording], places: Mapping[str, int]) -> StartGroup:
    seen: dict[Chunk, list[tuple[int, int, int]]] = {}
    watchers: Counter[str] = Counter()
    unsure: Counter[Chunk] = Counter()
    for recording in recordings:
        watched = recording.watched()
        watchers.update(watched)
        for place, (key, step) in enumerate(zip(recording.chunks(), recording.steps, strict=True)):
            seen.setdefault(key, []).append((len(watched), place, step[2]))
            unsure[key] += key[0] not in watched
    rows = []
    for key, found in seen.items():
        # Who could not watch a blob to the end has a say in what it saw of it, and none in what it did not see.
        of = watchers[key[0]] + unsure[key]
        if of >= 3 and (len(found) == 1 or 4 * len(found) < of):
            continue
        # A rank among few blobs is no rank among all.
        most = max(width for width, _, _ in found)
        rank = median_low([rank for width, rank, _ in found if width == most])
        at = median_low([at for width, _, at in found if width == most])
        rows.append(((rank + 4) * of // len(found), places[key[0]], key[1], at))
    rows.sort()
    return StartGroup(len(recordings), tuple((blob, chunk, at) for _, blob, chunk, at in rows[:MOST_STEPS]))
