"""What each of our binary formats promises of bytes from outside: a value that survives there and back, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import strategies as st

from dadi.errors import DadiError

T = TypeVar("T")


def taken_or_refused(data: bytes, decode: Callable[[bytes], T], encode: Callable[[T], bytes]) -> T | None:
    """Check that `data` is decoded, to what there and back is the same, or refused; return the value."""
    try:
        value = decode(data)
    except DadiError as error:  # and nothing else
        assert str(error)  # noqa: PT017
        return None
    assert decode(encode(value)) == value
    return value


def strange(magic: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, half of them behind the format's magic."""
    return st.builds(bytes.__add__, st.sampled_from((b"", magic)), st.binary(max_size=300))


def damaged(sample: bytes, intact: int = 8) -> st.SearchStrategy[bytes]:
    """A sample with up to four bytes changed, none of the first `intact`."""

    def change(damage: list[tuple[int, int]]) -> bytes:
        data = bytearray(sample)
        for at, value in damage:
            data[at] = value
        return bytes(data)

    place = st.tuples(st.integers(intact, len(sample) - 1), st.integers(0, 255))
    return st.lists(place, min_size=1, max_size=4).map(change)
