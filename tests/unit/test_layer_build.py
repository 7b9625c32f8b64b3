"""The one pass over a layer: what it gives, what it refuses, and that it stops when it is told to."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import random
import tarfile
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import DigestMismatch, Malformed, StoreFull, TooLarge, Unsupported
from dadi.index import layer as layers
from dadi.index.build import LayerSource, Limits, build
from dadi.index.chunks import MIN_CHUNK_SIZE, table_of
from dadi.index.layer import Kind, LayerIndex
from dadi.index.tar import TarLimits
from tests.fakes.tars import END, header, member, parse


def make_tar(size: int = 300_000) -> bytes:
    rng = random.Random(size)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(20):
            info = tarfile.TarInfo(f"usr/lib/{'x' * number * 12}/{number}")
            data = rng.randbytes(rng.randrange(size // 10))
            info.size, info.mtime = len(data), number + 0.5
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


TAR = make_tar()
FORMS = {"gzip": gzip.compress(TAR, 1), "zstd": zstandard.ZstdCompressor(level=1).compress(TAR), "plain": TAR}


class Sink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.data += data


def source_of(blob: bytes, tar: bytes = TAR) -> LayerSource:
    return LayerSource(digests.of(blob), len(blob), "application/vnd.oci.image.layer.v1.tar+gzip", digests.of(tar))


async def pieces_of(blob: bytes, step: int = 50_000) -> AsyncIterator[bytes]:
    for at in range(0, len(blob), step):
        yield blob[at : at + step]
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """The threads of a pass have nothing left to do when it is over: they end at once."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("index-"):
            thread.join(5)
            assert not thread.is_alive()


# ---- what it gives


@pytest.mark.parametrize("form", FORMS)
async def test_one_pass_gives_digests_chunks_entries_and_bytes(form: str) -> None:
    blob, sink = FORMS[form], Sink()
    index = await build(pieces_of(blob), source_of(blob), sink, chunk_size=4096)
    expected = LayerIndex(1, digests.of(blob), len(blob), digests.of(TAR), table_of(TAR, 4096), parse(TAR))
    assert index == expected
    assert sink.data == TAR
    assert len(index.entries) == 20
    assert layers.decode(layers.encode(index)) == index


def test_every_entry_points_at_its_data() -> None:
    index = asyncio.run(build(pieces_of(FORMS["gzip"]), source_of(FORMS["gzip"]), Sink()))
    with tarfile.open(fileobj=io.BytesIO(TAR)) as tar:
        for info, entry in zip(tar, index.entries, strict=True):
            content = tar.extractfile(info)
            assert content is not None
            assert TAR[entry.offset : entry.offset + entry.size] == content.read()


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(FORMS)), st.lists(st.integers(0, len(FORMS["zstd"])), max_size=30))
def test_the_same_layer_gives_the_same_bytes_in_pieces_of_any_size(form: str, cuts: list[int]) -> None:
    blob = FORMS[form]
    edges = [0, *sorted(cuts), len(blob)]

    async def pieces() -> AsyncIterator[bytes]:
        for start, end in zip(edges, edges[1:], strict=False):  # noqa: RUF007
            yield blob[start:end]

    index = asyncio.run(build(pieces(), source_of(blob), Sink()))
    assert layers.encode(index) == _reference(form)


def _reference(form: str) -> bytes:
    blob = FORMS[form]
    return layers.encode(LayerIndex(1, digests.of(blob), len(blob), digests.of(TAR), table_of(TAR), parse(TAR)))


@pytest.mark.parametrize("tar", [b"", END, header(b"d", b"5"), member(b"f", b"x") + END + b"padding"])
async def test_small_layers(tar: bytes) -> None:
    sink = Sink()
    index = await build(pieces_of(gzip.compress(tar)), source_of(gzip.compress(tar), tar), sink)
    assert index.table == table_of(tar)
    assert (index.diff_id, bytes(sink.data)) == (digests.of(tar), tar)
    assert index.entries == parse(tar)


@pytest.mark.parametrize("size", [MIN_CHUNK_SIZE * 3, MIN_CHUNK_SIZE * 3 + 512, 512])
async def test_the_last_chunk_may_be_short(size: int) -> None:
    tar = bytes(size)
    index = await build(pieces_of(tar), source_of(tar, tar), Sink(), chunk_size=MIN_CHUNK_SIZE)
    assert index.table == table_of(tar, MIN_CHUNK_SIZE)


@pytest.mark.parametrize("chunk_size", [0, 5000, 1 << 30])
async def test_a_chunk_size_that_no_table_may_have_is_refused(chunk_size: int) -> None:
    with pytest.raises(Malformed, match="chunk size"):
        await build(pieces_of(TAR), source_of(TAR), Sink(), chunk_size=chunk_size)


async def test_progress_rises_to_the_whole_size() -> None:
    blob, seen = FORMS["gzip"], list[int]()
    await build(pieces_of(blob, 1000), source_of(blob), Sink(), on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(blob)


# ---- what it refuses


async def _refused(blob: bytes, source: LayerSource, limits: Limits | None = None) -> None:
    await build(pieces_of(blob), source, Sink(), limits=limits)


@pytest.mark.parametrize("form", FORMS)
async def test_one_wrong_bit_is_a_digest_mismatch_whatever_it_breaks(form: str) -> None:
    blob = FORMS[form]
    for at in (0, 5, 300, len(blob) // 2, len(blob) - 1):
        wrong = bytearray(blob)
        wrong[at] ^= 4
        with pytest.raises(DigestMismatch, match="the bytes that arrived are sha256:"):
            await _refused(bytes(wrong), source_of(blob))


@pytest.mark.parametrize("form", FORMS)
async def test_bytes_that_stop_too_early_are_a_digest_mismatch(form: str) -> None:
    blob = FORMS[form]
    for size in (0, 3, 1000, len(blob) - 1):
        with pytest.raises(DigestMismatch, match=f"{size} bytes arrived; its manifest says {len(blob)}"):
            await _refused(blob[:size], source_of(blob))


async def test_bytes_that_do_not_stop_are_cut_off() -> None:
    blob, taken = FORMS["gzip"], 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += len(blob)
            yield blob

    with pytest.raises(DigestMismatch, match="more than"):
        await build(endless(), source_of(blob), Sink())
    assert taken == 2 * len(blob)


async def test_another_diff_id_is_a_digest_mismatch_that_names_both() -> None:
    blob = FORMS["gzip"]
    wrong = source_of(blob, b"another tar")
    with pytest.raises(DigestMismatch, match=f"unpacks to {digests.of(TAR)}; the image's config says {wrong.diff_id}"):
        await _refused(blob, wrong)


@pytest.mark.parametrize(
    ("blob", "error", "why"),
    [
        (gzip.compress(header(b"../x") + END), Malformed, "component"),
        (gzip.compress(member(b"f", b"x" * 5000)[:2000]), Malformed, "breaks off"),
        (gzip.compress(TAR)[:-9], Malformed, "cut off"),
        (gzip.compress(TAR) + b"something that is not gzip", Malformed, "behind its gzip data"),
        (gzip.compress(header(b"f", b"V") + END), Unsupported, "of type b'V'"),
        (b"BZh91AY" + bytes(100), Unsupported, "bzip2"),
        (bytes(range(256)) * 100, Malformed, "tar header at byte 0"),
    ],
    ids=["component", "breaks off", "cut off", "behind its end", "strange type", "bzip2", "no tar"],
)
async def test_a_layer_that_is_wrong_in_itself_is_named(blob: bytes, error: type[Malformed], why: str) -> None:
    with pytest.raises(error, match=why) as caught:
        await _refused(blob, source_of(blob))
    assert str(caught.value).startswith(f"layer {digests.of(blob)}: ")


@pytest.mark.parametrize("limits", [Limits(max_uncompressed_size=len(TAR) - 1), Limits(tar=TarLimits(max_entries=3))])
async def test_limits_hold(limits: Limits) -> None:
    with pytest.raises(TooLarge):
        await _refused(FORMS["gzip"], source_of(FORMS["gzip"]), limits)


# ---- stopping


BIG = random.Random(7).randbytes(48 << 20)
"""Plain bytes behind a header: a tar of one file that does not get smaller."""
BIG_TAR = header(b"big", size=len(BIG)) + BIG + END


class Slow(Sink):
    """Writes nothing before it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.released = threading.Event()
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.entered.set()
        assert self.released.wait(60)
        super().write(data)


class Watched:
    """Gives pieces without ever making the loop wait, and says how much it gave."""

    def __init__(self, blob: bytes, step: int = 256 << 10) -> None:
        self._blob, self._step, self.given = blob, step, 0

    def __aiter__(self) -> Watched:
        return self

    async def __anext__(self) -> bytes:
        if self.given >= len(self._blob):
            raise StopAsyncIteration
        piece = self._blob[self.given : self.given + self._step]
        self.given += len(piece)
        return piece


async def _rounds(count: int) -> None:
    """Let the loop go round: a task that has something to do does it meanwhile."""
    for _ in range(count):
        await asyncio.sleep(0)


async def _held_back(sink: Slow) -> None:
    while not sink.entered.is_set():
        await asyncio.sleep(0)
    await _rounds(1000)


async def test_a_slow_sink_holds_back_the_source_and_not_the_loop() -> None:
    sink, pieces = Slow(), Watched(BIG_TAR)
    task = asyncio.create_task(build(pieces, source_of(BIG_TAR, BIG_TAR), sink))
    await _held_back(sink)
    assert pieces.given < 16 << 20
    sink.released.set()
    index = await task
    assert hashlib.sha256(sink.data).hexdigest() == index.diff_id[7:]


async def test_cancelling_ends_the_pass_and_nothing_is_written_afterwards() -> None:
    sink, pieces = Slow(), Watched(BIG_TAR)
    task = asyncio.create_task(build(pieces, source_of(BIG_TAR, BIG_TAR), sink))
    await _held_back(sink)
    task.cancel()
    await _rounds(3)
    task.cancel()  # however often it is said
    await _rounds(100)
    assert not task.done()  # one write is under way, and cannot be taken back
    sink.released.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    sink.closed = True
    assert len(sink.data) < len(BIG_TAR)


async def test_cancelling_while_the_source_is_silent_ends_the_pass() -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield FORMS["gzip"][:1000]
        await asyncio.Event().wait()

    task = asyncio.create_task(build(silent(), source_of(FORMS["gzip"]), Sink()))
    await _rounds(10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


async def test_what_the_source_raises_ends_the_pass() -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield FORMS["zstd"][:1000]
        raise ConnectionResetError("cut in the middle")

    with pytest.raises(ConnectionResetError, match="cut in the middle"):
        await build(failing(), source_of(FORMS["zstd"]), Sink())


@pytest.mark.parametrize("error", [StoreFull("no room"), RuntimeError("a bug")])
async def test_what_the_sink_raises_ends_the_pass_at_once(error: Exception) -> None:
    class Full(Sink):
        def write(self, data: bytes) -> None:
            raise error

    pieces = Watched(BIG_TAR)
    with pytest.raises(type(error), match=str(error)):
        await build(pieces, source_of(BIG_TAR, BIG_TAR), Full())
    assert pieces.given < 16 << 20
    with pytest.raises(type(error), match=str(error)):  # so small a layer that it has all been taken before
        await build(pieces_of(FORMS["gzip"]), source_of(FORMS["gzip"]), Full())


async def test_pieces_that_are_no_bytes_end_the_pass() -> None:
    async def text() -> AsyncIterator[str]:
        yield "text"

    with pytest.raises(TypeError):
        await build(text(), source_of(FORMS["gzip"]), Sink())


async def test_what_on_progress_raises_ends_the_pass() -> None:
    def fail(_: int) -> None:
        raise RuntimeError("the caller's mistake")

    with pytest.raises(RuntimeError, match="the caller's mistake"):
        await build(pieces_of(FORMS["gzip"]), source_of(FORMS["gzip"]), Sink(), on_progress=fail)


async def test_many_passes_at_a_time_do_not_wait_for_each_other() -> None:
    sinks = [Sink() for _ in range(8)]
    blob = FORMS["gzip"]
    indexes = await asyncio.gather(*(build(pieces_of(blob), source_of(blob), sink) for sink in sinks))
    assert all(index == indexes[0] for index in indexes)
    assert all(sink.data == TAR for sink in sinks)


async def test_whiteouts_reach_the_index() -> None:
    tar = member(b"etc/.wh.passwd") + member(b"opt/.wh..wh..opq") + END
    index = await build(pieces_of(tar), source_of(tar, tar), Sink())
    assert [(entry.kind, entry.path) for entry in index.entries] == [
        (Kind.WHITEOUT, b"etc/passwd"),
        (Kind.OPAQUE, b"opt"),
    ]
