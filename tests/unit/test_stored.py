"""The table of chunk and blob states, event by event: what is believed, and how many bytes that makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dadi.blobs.layout import BlobDirectory
from dadi.blobs.stored import State, Stored
from dadi.index.chunks import blob_of
from tests.contracts.store import C, content, parts_of

DATA = content(3 * C + 100)
BLOB = blob_of(DATA, C)
PARTS = parts_of(BLOB, DATA)


def stored(present: bytes | None = bytes(4), *, trusted: bool = True) -> Stored:
    marks = None if present is None else bytearray(present)
    return Stored(BlobDirectory(Path("/none")), BLOB, marks, trusted=trusted)


def seen(one: Stored) -> tuple[bytes, set[int], State, int]:
    return bytes(one.present), one.claimed, one.state, one.bytes


def test_what_comes_is_present_once_and_counted_once() -> None:
    one = stored()
    assert one.come(2, PARTS[2:]) == C + 100
    assert one.come(1, PARTS[1:3]) == C, "the second of them was there"
    assert seen(one) == (b"\0\1\1\1", set(), State.PARTIAL, 2 * C + 100)
    assert (one.missing(range(4)), one.missing(range(1, 4)), one.missing(range(0))) == ([0], [], [])


def test_marks_of_an_unclean_stop_are_claims_that_nobody_reads() -> None:
    one = stored(b"\1\0\1\1", trusted=False)
    assert seen(one) == (bytes(4), {0, 2, 3}, State.PARTIAL, 2 * C + 100)
    assert (one.missing(range(4)), one.believed(range(4))) == ([0, 1, 2, 3], [0, 2, 3])


def test_a_claim_is_present_if_right_and_missing_if_wrong_and_may_be_overwritten_before() -> None:
    one = stored(b"\1\0\1\1", trusted=False)
    assert one.come(2, PARTS[2:3]) == 0, "its bytes were counted as a claim"
    assert one.hashed([0, 2, 3], {0}) == [3], "chunk 2 has come while it was looked at"
    assert one.drop([3]) == 100
    assert seen(one) == (b"\1\0\1\0", set(), State.PARTIAL, 2 * C)


def test_a_whole_that_is_not_its_digests_refuses_its_table_for_good() -> None:
    one = stored()
    one.come(0, PARTS)
    marks = one.present
    assert one.lied() == len(DATA)
    assert one.come(0, PARTS) == 0
    assert seen(one) == (bytes(4), set(), State.REFUSED, 0)
    assert one.present is marks, "the kernel's readers look at that very object"
    with pytest.raises(AssertionError):
        one.finished()


def test_what_could_not_be_made_durable_is_missing_and_may_come_again() -> None:
    one = stored()
    one.come(0, PARTS)
    assert one.lost() == len(DATA)
    assert one.come(0, PARTS) == len(DATA)
    one.finished()
    assert one.state is State.COMPLETE


def test_a_complete_blob_loses_chunks_at_once_and_its_completeness_when_that_is_written_down() -> None:
    one = stored(None)
    assert (one.complete, one.bytes) == (True, len(DATA))
    assert one.drop([1]) == C
    assert (one.complete, one.missing(range(4))) == (True, [1])
    one.withdrawn()
    assert seen(one) == (b"\1\0\1\1", set(), State.PARTIAL, 2 * C + 100)


def test_another_table_reads_what_was_verified_as_a_whole_and_nothing_else() -> None:
    other = blob_of(DATA, 2 * C)
    assert stored(None).serves(other)
    assert not stored(b"\1\1\1\1").serves(other)
    assert stored().serves(BLOB)
