"""Startup traces: which chunks a container of an image reads first, in order; recorded, merged, judged. Pure.

    recording   what one node saw of one start: the chunks in the order of their first reads, with times
    trace       what the superpeer makes of the recordings of several nodes, and hands out with the image. Starts that
                read other things (another entry point) are another *group*; the most frequent group comes first
    message     what a node sends: a recording, a report on the trace that it replayed, or both

    bytes        what
    0..7         magic: "DADITRC1" a trace, "DADIREC1" a message, "DADITRK1" what a superpeer keeps of an image
    8..          MessagePack: arrays of fields in the order below; deterministic

A step is [place in `blobs`, chunk, milliseconds since the first read]. What is read here may come from anybody who may
have the image: a trace that is wrong costs bandwidth, and what breaks a limit is Malformed.

    merging     recordings whose sets of chunks are alike (Jaccard index ≥ `ALIKE`, over the blobs that both nodes could
                watch) are a group; of three and more, chunks that only one has are left out; the order is by the median
                place, later the fewer have the chunk
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from statistics import median_low
from typing import Annotated, TypeVar

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
_MAGIC_TRACE, _MAGIC_MESSAGE, _MAGIC_KEPT = b"DADITRC1", b"DADIREC1", b"DADITRK1"

_Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
_ChunkSize = Annotated[int, Meta(ge=MIN_CHUNK_SIZE, le=MAX_CHUNK_SIZE)]
_Blobs = Annotated[tuple[tuple[Digest, _ChunkSize], ...], Meta(max_length=MAX_LAYERS)]
_Steps = Annotated[tuple[tuple[_Count, _Count, _Count], ...], Meta(max_length=MOST_STEPS)]
_Name = Annotated[str, Meta(max_length=128)]
Chunk = tuple[str, int]
"""A blob's digest and the number of a chunk of it."""


class Recording(msgspec.Struct, frozen=True, array_like=True):
    """One start on the node `node`. `blobs`: those that it could watch (with their chunk sizes), read or not."""

    node: _Name
    blobs: _Blobs
    steps: _Steps

    def chunks(self) -> list[Chunk]:
        """Return the chunks in order."""
        return [(self.blobs[blob][0], chunk) for blob, chunk, _ in self.steps]


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


class Group(msgspec.Struct, frozen=True, array_like=True):
    """One way in which the image is started, as `recordings` starts saw it."""

    recordings: _Count
    steps: _Steps


class Trace(msgspec.Struct, frozen=True, array_like=True):
    """What is handed out with an image."""

    manifest: Digest
    blobs: _Blobs
    groups: Annotated[tuple[Group, ...], Meta(max_length=MOST_GROUPS)]

    def chunks(self, group: Group) -> list[Chunk]:
        """Return a group's chunks in order."""
        return [(self.blobs[blob][0], chunk) for blob, chunk, _ in group.steps]


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What a superpeer keeps of an image on disk, the newest last. `dropped`: how often its trace was found useless."""

    manifest: Digest
    recordings: Annotated[tuple[Recording, ...], Meta(max_length=MOST_RECORDINGS)] = ()
    reports: Annotated[tuple[Report, ...], Meta(max_length=MOST_REPORTS)] = ()
    dropped: _Count = 0


T = TypeVar("T", Trace, Message, Kept)
_encoder = msgspec.msgpack.Encoder()


def encode(thing: Trace | Message | Kept) -> bytes:
    """Return the bytes; deterministic."""
    return _magic(type(thing)) + _encoder.encode(thing)


def decode(data: bytes | bytearray, kind: type[T]) -> T:
    """Return a Trace, a Message or a Kept; raise Malformed for what is none, or contradicts itself."""
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
    elif isinstance(thing, Kept):
        parts = [(recording.blobs, recording.steps) for recording in thing.recordings]
    else:
        parts = [(thing.recording.blobs, thing.recording.steps)] if thing.recording else []
    for blobs, steps in parts:
        if any(blob >= len(blobs) for blob, _, _ in steps):
            raise Malformed("a startup trace with a step in a blob that it does not name")
        if len({(blob, chunk) for blob, chunk, _ in steps}) != len(steps):
            raise Malformed("a startup trace that names a chunk twice")
        if len({digest for digest, _ in blobs}) != len(blobs):
            raise Malformed("a startup trace that names a blob twice")
    return thing


def _magic(kind: type[Trace | Message | Kept]) -> bytes:
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


def added(kept: Kept, recording: Recording) -> Kept:
    """Return what is kept, with one more recording; of each node and group the newest stays, and so many in all."""
    groups = _grouped([recording, *kept.recordings])
    mine = next(group for group in groups if any(each is recording for each in group))
    others = [each for each in mine if each is not recording]
    gone = {id(each) for each in others if each.node == recording.node}
    fresh = [each for each in kept.recordings if any(each is other for other in others) and id(each) not in gone]
    gone |= {id(each) for each in fresh[: max(0, len(fresh) - MOST_IN_GROUP + 1)]}
    left = [each for each in kept.recordings if id(each) not in gone]
    return msgspec.structs.replace(kept, recordings=(*left, recording)[-MOST_RECORDINGS:])


def merged(kept: Kept) -> Trace | None:
    """Return the trace of what is kept; None if there is nothing to replay."""
    blobs = sorted({pair for recording in kept.recordings for pair in recording.blobs})
    places = {digest: place for place, (digest, _) in enumerate(blobs)}
    if len(places) != len(blobs) or len(blobs) > MAX_LAYERS:
        # Nodes that had the image in chunks of two sizes: of the last one is what counts.
        return merged(msgspec.structs.replace(kept, recordings=kept.recordings[-1:]))
    groups = [_group(group, places) for group in _grouped(kept.recordings)]
    groups = sorted((group for group in groups if group.steps), key=lambda group: (-group.recordings, group.steps))
    return Trace(kept.manifest, tuple(blobs), tuple(groups[:MOST_GROUPS])) if groups else None


def _grouped(recordings: Sequence[Recording]) -> list[list[Recording]]:
    """Return recordings in groups of those that are alike; whatever the order they came in, the groups are the same."""
    groups: list[list[tuple[Recording, set[Chunk], set[str]]]] = []
    for recording in sorted(recordings, key=lambda each: (-len(each.steps), each.steps, each.node)):
        chunks, watched = set(recording.chunks()), {digest for digest, _ in recording.blobs}
        best, at = ALIKE, -1
        for place, group in enumerate(groups):
            alike = sum(_alike(chunks, watched, other, seen) for _, other, seen in group) / len(group)
            if alike > best or (alike == best and at < 0):
                best, at = alike, place
        if at < 0:
            groups.append([])
        groups[at].append((recording, chunks, watched))
    return [[recording for recording, _, _ in group] for group in groups]


def _alike(chunks: set[Chunk], watched: set[str], other: set[Chunk], seen: set[str]) -> float:
    if watched != seen:
        both = watched & seen
        chunks, other = ({chunk for chunk in each if chunk[0] in both} for each in (chunks, other))
    union = len(chunks | other)
    return len(chunks & other) / union if union else 1.0


def _group(recordings: Sequence[Recording], places: Mapping[str, int]) -> Group:
    seen: dict[Chunk, list[tuple[int, int]]] = {}
    watched: dict[str, int] = {}
    for recording in recordings:
        for digest, _ in recording.blobs:
            watched[digest] = watched.get(digest, 0) + 1
        for place, (key, step) in enumerate(zip(recording.chunks(), recording.steps, strict=True)):
            seen.setdefault(key, []).append((place, step[2]))
    rows = []
    for (digest, chunk), found in seen.items():
        of = watched[digest]
        if of >= 3 and (len(found) == 1 or 4 * len(found) < of):
            continue
        rank, at = median_low([rank for rank, _ in found]), median_low([at for _, at in found])
        rows.append(((rank + 4) * of // len(found), places[digest], chunk, at))
    rows.sort()
    return Group(len(recordings), tuple((blob, chunk, at) for _, blob, chunk, at in rows[:MOST_STEPS]))
