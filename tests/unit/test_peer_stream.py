"""Records of a stream of chunks: what is one, what is none, and which errors come out of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.blobs.single_flight import runs
from dadi.errors import AccessDenied, DadiError, DigestMismatch, InvalidRequest, NotFound, StoreFull, Unavailable
from dadi.peers import stream


@given(kind=st.sampled_from([stream.PLAIN, stream.FRAME]), chunk=st.integers(0, 2**32 - 1),
       length=st.integers(0, 2**32 - 1))  # fmt: skip
def test_a_record_says_what_was_put_into_it(kind: int, chunk: int, length: int) -> None:
    assert stream.parse(stream.head(kind, chunk, length)) == (kind, chunk, length)


@given(data=st.binary(min_size=stream.SIZE, max_size=stream.SIZE))
def test_bytes_are_a_record_or_wrong(data: bytes) -> None:
    try:
        kind, _, length = stream.parse(data)
    except DigestMismatch:
        return
    assert kind in (stream.PLAIN, stream.FRAME) or length <= stream.MAX_ERROR


@pytest.mark.parametrize(("kind", "length"), [(stream.WAITS, 1), (4, 0), (stream.ERROR, stream.MAX_ERROR + 1)])
def test_what_is_no_record_is_refused(kind: int, length: int) -> None:
    with pytest.raises(DigestMismatch):
        stream.parse(stream.head(kind, 0, length))


@pytest.mark.parametrize(
    ("error", "as_what"),
    [(NotFound("a"), NotFound), (AccessDenied("b"), AccessDenied), (DigestMismatch("c"), Unavailable),
     (StoreFull("d"), Unavailable), (Unavailable("e" * (1 << 20)), Unavailable)],
)  # fmt: skip
def test_an_error_of_a_peer_never_is_a_lie_of_his(error: DadiError, as_what: type[DadiError]) -> None:
    record = stream.error_record(error)
    kind, _, length = stream.parse(record[: stream.SIZE])
    assert (kind, length) == (stream.ERROR, len(record) - stream.SIZE)
    told, after, instead = stream.error_of(record[stream.SIZE :], "peer")
    assert (type(told), after, instead) == (as_what, None, "")


def test_a_busy_peer_says_for_how_long_and_who_else() -> None:
    record = stream.error_record(Unavailable("the rate is used up", retry_after=2.5), "node7")
    error, after, instead = stream.error_of(record[stream.SIZE :], "peer")
    assert (type(error), after, instead) == (Unavailable, 2.5, "node7")
    assert "the rate is used up" in error.message


@given(body=st.binary(max_size=200))
def test_whatever_comes_as_an_error_is_one(body: bytes) -> None:
    error, _, _ = stream.error_of(body, "peer")
    assert isinstance(error, Unavailable | NotFound | AccessDenied)


@pytest.mark.parametrize("said", [b'"x"', b"true", b"null", b"-5", b"1e999", b"[]"])
def test_odd_times_are_bounded_or_none(said: bytes) -> None:
    body = b'{"error":"unavailable","message":"m","retry_after":' + said + b',"instead":5}'
    _, after, instead = stream.error_of(body, "peer")
    assert after is None or 0 <= after <= 86400
    assert instead == ""


@given(chunks=st.sets(st.integers(0, 999), min_size=1, max_size=60).map(sorted))
def test_chunks_asked_for_are_those_that_were_named(chunks: list[int]) -> None:
    assert stream.chunks_of(stream.chunks_text(runs(chunks)), 1000, 60) == chunks


@given(text=st.text(alphabet="0123456789-,٣ x", max_size=30))
def test_a_header_names_chunks_of_the_blob_ascending_and_not_too_many_or_is_refused(text: str) -> None:
    try:
        found = stream.chunks_of(text, 50, 10)
    except InvalidRequest:
        return
    assert 0 < len(found) <= 10
    assert found == sorted(set(found))
    assert found[-1] < 50


@pytest.mark.parametrize("text", ["", ",", "3,2", "3-2", "1,1", "50", "0-49", "-1", "1-", "0-999999999", "1, 2", "٣"])
def test_what_names_no_chunks_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        stream.chunks_of(text, 50, 10)
