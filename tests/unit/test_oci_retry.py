"""Backoff, Retry-After, and patience."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import DigestMismatch, NotFound, Unavailable
from dadi.oci.retry import Patience, backoff, parse_retry_after
from tests.fakes.registry import FakeTime


def patience(time: FakeTime, retries: int = 3) -> Patience:
    return Patience(time.clock(), retries=retries, first=0.5, most=4.0, max_retry_after=60.0)


def test_the_wait_doubles_up_to_its_limit_and_chance_takes_up_to_half() -> None:
    assert [backoff(n, 0.5, 4.0, 0.0) for n in range(1, 7)] == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert backoff(1, 0.5, 4.0, 1.0) == 0.25
    assert backoff(10_000, 0.5, 4.0, 0.0) == 4.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 60.0),
        ("Sun, 06 Nov 1994 08:00:00 GMT", 0.0),
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("²", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str | None, seconds: float | None) -> None:
    assert parse_retry_after(text, 784111777.0 - 60) == seconds


@given(st.text(max_size=40))
def test_any_retry_after_is_a_time_or_nothing(text: str) -> None:
    found = parse_retry_after(text, 0.0)
    assert found is None or found >= 0


async def test_a_retryable_error_is_met_with_waits_and_then_raised() -> None:
    time = FakeTime()
    spent = patience(time)
    error = Unavailable("no")
    for _ in range(3):
        await spent.spend(error)
    with pytest.raises(Unavailable, match="gave up after 4 attempts"):
        await spent.spend(error)
    assert time.slept == [0.5, 1.0, 2.0]


async def test_progress_restores_patience() -> None:
    time = FakeTime()
    spent = patience(time, retries=1)
    for _ in range(5):
        await spent.spend(Unavailable("no"))
        spent.restored()
    assert time.slept == [0.5] * 5


async def test_what_the_registry_asks_for_is_waited_for_unless_it_is_too_long() -> None:
    time = FakeTime()
    await patience(time).spend(Unavailable("no", retry_after=30.0))
    assert time.slept == [30.5]
    with pytest.raises(Unavailable) as failure:
        await patience(time).spend(Unavailable("no", retry_after=61.0))
    assert failure.value.retry_after == 61.0


async def test_a_wrong_digest_gets_one_more_try_and_other_errors_none() -> None:
    time = FakeTime()
    spent = patience(time)
    await spent.spend(DigestMismatch("wrong"))
    with pytest.raises(DigestMismatch):
        await spent.spend(DigestMismatch("wrong"))
    with pytest.raises(NotFound):
        await patience(time).spend(NotFound("none"))


async def test_without_retries_nothing_is_tried_again() -> None:
    time = FakeTime()
    for error in (Unavailable("no"), DigestMismatch("wrong")):
        with pytest.raises(type(error)):
            await patience(time, retries=0).spend(error)
    assert time.slept == []
