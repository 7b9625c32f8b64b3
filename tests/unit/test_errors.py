"""The error tree: each class has its own code, and comes over the wire as itself."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi import errors
from dadi.errors import DadiError
from dadi.wire import EventReader, error_fields, error_from, error_in

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, DadiError)]


def test_codes_are_unique() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES) > 12


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_the_wire(cls: type[DadiError]) -> None:
    sent = cls("it failed there", hint="do this")
    received = error_from(error_fields(sent))
    assert (type(received), str(received)) == (cls, "it failed there (do this)")


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_has_a_status_and_an_errno_that_exist(cls: type[DadiError]) -> None:
    assert 400 <= cls.status <= 599
    assert cls.errno in errno.errorcode
    assert cls.__doc__


def test_an_error_from_a_newer_version_is_still_an_error() -> None:
    assert type(error_from({"error": "from-the-future", "message": "m"})) is DadiError


@given(st.binary(max_size=300))
def test_any_body_is_an_error_of_ours_or_none(body: bytes) -> None:
    assert error_in(body) is None or isinstance(error_in(body), DadiError)


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_any_stream_is_events_or_an_error(pieces: list[bytes]) -> None:
    reader = EventReader("somebody")
    try:
        for piece in pieces:
            for event in reader.feed(piece):
                assert isinstance(event, dict)
        reader.end()
    except DadiError:
        pass


def test_events_come_whole_whatever_the_pieces() -> None:
    reader = EventReader("somebody")
    data = b'{"event":"progress","n":1}\n{"event":"done"}\n'
    events = [event for at in range(len(data)) for event in reader.feed(data[at : at + 1])]
    assert events == [{"event": "progress", "n": 1}, {"event": "done"}]
    reader.end()


@pytest.mark.parametrize("body", [b'{"error":"\xff"}', b'{"\xff":1}', b'"\xff"', b"\xff"])
def test_what_is_not_utf_8_is_no_error_of_ours(body: bytes) -> None:
    assert error_in(body) is None
    with pytest.raises(DadiError):
        list(EventReader("somebody").feed(body + b"\n"))
