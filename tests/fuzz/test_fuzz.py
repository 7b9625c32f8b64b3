"""Each target for a moment, by hypothesis: bytes, seeds with something else in the middle; what once broke one."""

from __future__ import annotations

import ast
import random
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dadi
import fuse
import registry_proxy
import superpeer
from tests.fuzz import targets
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
    @settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
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
def test_what_it_begins_with_is_right_so_that_what_is_changed_in_it_is_looked_at(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


def _parsers() -> list[str]:
    """Return MODULE.FUNCTION of what reads a format, by its name."""
    found = []
    for package in (dadi, superpeer, registry_proxy, fuse):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            module = ".".join(file.relative_to(root.parent).with_suffix("").parts)
            names = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
            found += [f"{module}.{name}" for name in names if re.match(r"(parse|decode)(_|$)", name)]
    return found


def test_whatever_parses_is_fuzzed() -> None:
    """By the names that parsers have here; the list says which read nothing from outside."""
    ours = {
        "dadi.containerd.config.parse_version": "an option",
        "superpeer.jobs_operators.parse": "an operator's file",
        "dadi.digest.parse": "in most of the others",
    }
    fed = Path(targets.__file__).read_text()
    parsers = _parsers()
    assert len(parsers) > 30
    missing = []
    for each in set(parsers) - set(ours):
        module, name = each.split(".")[-2:]
        if not re.search(rf"\b{module}\.{name}\b" if name in ("parse", "decode") else rf"\b{name}\b", fed):
            missing.append(each)
    assert missing == []


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
