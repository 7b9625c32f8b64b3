"""Ranges and credentials of requests."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import InvalidRequest
from dadi.originals import byte_range
from dadi.originals.caller import ANYBODY, Caller, parse


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, (0, 100, 200)),
        ("bytes=0-0", (0, 1, 206)),
        ("bytes=10-19", (10, 10, 206)),
        ("bytes=90-", (90, 10, 206)),
        ("bytes=90-1000", (90, 10, 206)),
        ("bytes=-10", (90, 10, 206)),
        ("bytes=-1000", (0, 100, 206)),
        ("bytes=100-", (0, 0, 416)),
        ("bytes=-0", (0, 0, 416)),
        ("bytes=5-4", (0, 0, 416)),
        ("bytes=0-1,3-4", (0, 100, 200)),
        ("items=0-1", (0, 100, 200)),
        ("bytes=", (0, 100, 200)),
        ("bytes=-", (0, 100, 200)),
    ],
)
def test_what_a_range_means(header: str | None, expected: tuple[int, int, int]) -> None:
    assert byte_range.parse(header, 100) == expected


@given(st.text(max_size=40) | st.from_regex(r"bytes=[0-9]{0,20}-[0-9]{0,20}", fullmatch=True), st.integers(0, 1 << 62))
def test_a_range_lies_in_the_blob(header: str, size: int) -> None:
    offset, length, status = byte_range.parse(header, size)
    assert 0 <= offset <= offset + length <= size
    assert status in (200, 206, 416)
    assert (status == 200) <= (length == size)


def test_credentials_are_for_one_registry_and_never_shown() -> None:
    secret = base64.b64encode(b"user:pass:word").decode()
    caller = parse(f"Basic {secret}")
    assert secret not in repr(caller)
    assert secret not in caller.key
    assert caller.key != parse("Bearer abc").key
    assert parse(None) is ANYBODY
    assert parse("") is ANYBODY


async def test_another_registry_gets_no_credentials() -> None:
    source = Caller("Bearer abc").for_registry("a.example")
    found = await source.get("a.example")
    assert found is not None
    assert found.registry_token == "abc"
    assert await source.get("b.example") is None


@pytest.mark.parametrize(
    "text",
    ["Basic", "Basic ", "Basic !!!", "Basic " + base64.b64encode(b"nocolon").decode(), "Digest x", "Bearer a b",
     "Bearer " + "x" * (17 << 10), "Bearer é", "Basic " + "A" * 5],
)  # fmt: skip
def test_what_is_no_authorization(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(text)
    assert text.partition(" ")[2][:20] not in str(caught.value) or not text.partition(" ")[2].strip()


@given(st.text(max_size=60))
def test_any_header_is_a_caller_or_invalid(text: str) -> None:
    try:
        assert parse(text).authorization == text
    except InvalidRequest:
        assert text
