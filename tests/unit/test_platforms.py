"""Platforms: one spelling, and what runs where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import InvalidRequest
from dadi.oci import platforms


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("Linux/ARM", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("windows/amd64", "windows/amd64"),
    ],
)
def test_a_platform_has_one_spelling(text: str, canonical: str) -> None:
    assert str(platforms.parse(text)) == canonical


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/a b", "linux/amd64/" + "v" * 65])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        platforms.parse(text)


@pytest.mark.parametrize(
    ("image", "machine", "runs"),
    [
        ("linux/amd64", "linux/amd64", True),
        ("linux/amd64", "linux/amd64/v3", True),
        ("linux/amd64/v3", "linux/amd64", False),
        ("linux/arm/v6", "linux/arm/v7", True),
        ("linux/arm/v7", "linux/arm/v6", False),
        ("linux/arm/v7", "linux/arm64", False),
        ("linux/arm64/v8.2", "linux/arm64", False),
        ("linux/arm64", "linux/arm64/v9", True),
        ("windows/amd64", "linux/amd64", False),
        ("linux/riscv64", "linux/riscv64", True),
        ("linux/mips/odd", "linux/mips", False),
        ("linux/mips", "linux/mips/odd", True),
    ],
)
def test_what_runs_where(image: str, machine: str, runs: bool) -> None:
    assert platforms.parse(image).runs_on(platforms.parse(machine)) is runs


def test_the_highest_level_that_runs_is_the_nearest() -> None:
    machine = platforms.parse("linux/arm/v7")
    offers = [platforms.parse(f"linux/arm/{level}") for level in ("v5", "v6", "v8")]
    near = [(d, str(offer)) for offer in offers if (d := platforms.distance(offer, machine)) is not None]
    assert min(near)[1] == "linux/arm/v6"


def test_the_machine_names_of_uname_are_known() -> None:
    assert str(platforms.of_machine("x86_64")) == "linux/amd64"
    assert str(platforms.of_machine("armv7l")) == "linux/arm/v7"


def test_attestations_are_for_no_known_platform() -> None:
    assert not platforms.normalized("unknown", "unknown").known
    assert not platforms.normalized("", "").known
    assert platforms.normalized("linux", "amd64").known


@given(st.text(max_size=10), st.text(max_size=10), st.text(max_size=10))
def test_a_platform_runs_on_itself_and_normalising_is_idempotent(os: str, architecture: str, variant: str) -> None:
    once = platforms.normalized(os, architecture, variant)
    assert platforms.normalized(once.os, once.architecture, once.variant) == once
    assert once.runs_on(once)
