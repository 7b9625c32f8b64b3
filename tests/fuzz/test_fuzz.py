"""Each target for a moment, by hypothesis: bytes, seeds with something else in the middle; what once broke one."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, check

CRASHES = Path(__file__).with_name("crashes")
MOST_MEMORY = 32 << 20


def mutated(seed: bytes) -> st.SearchStrategy[bytes]:
    """Return strategies that keep most of a seed."""

    def put(place: float, cut: int, piece: bytes) -> bytes:
        at = int(place * len(seed))
        return seed[:at] + piece + seed[at + cut :]

    return st.builds(put, st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40))


@pytest.mark.parametrize("name", TARGETS)
def test_it_is_taken_or_refused_by_an_error_of_ours_in_little_memory(name: str) -> None:
    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
    @given(st.one_of(st.binary(max_size=300), *map(mutated, TARGETS[name].seeds)))
    def feed(data: bytes) -> None:
        check(name, data)

    for seed in TARGETS[name].seeds:
        check(name, seed)
    tracemalloc.start()
    try:
        feed()
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_deep_long_and_repeated_input_ends_soon(name: str) -> None:
    """What parsers are known to fall over: nesting, very long tokens, and what makes expressions backtrack."""
    noise = random.Random(1).randbytes(1 << 16)
    plain = b"[ ( a \\ \" \0 \xff 9 ../ , = a= \x81 &a".split(b" ")
    for piece in (*plain, b'{"a":', b" "):
        check(name, piece * (1 << 14))
        for seed in TARGETS[name].seeds[:1]:
            check(name, seed + piece * (1 << 12))
    check(name, noise)


@pytest.mark.parametrize("file", sorted(CRASHES.iterdir()) if CRASHES.exists() else [], ids=lambda file: file.name)
def test_an_input_that_once_broke_it_does_so_no_more(file: Path) -> None:
    check(file.name.partition(".")[0], file.read_bytes())
