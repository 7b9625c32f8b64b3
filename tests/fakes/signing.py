"""What tests of tokens share: a clock that stands still, keys of a superpeer that sign by it, tokens to show.

The fixtures are imported by the files that use them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dadi.peers import token as tokens
from dadi.peers.token import Kind
from superpeer.signing import SigningKeys

A, B, C = ("sha256:" + letter * 64 for letter in "abc")


class Clock:
    """Seconds; they pass when a test says so."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def signing(tmp_path: Path, clock: Clock) -> SigningKeys:
    keys = SigningKeys(tmp_path / "keys", lifetime=1000, keep=5000, clock=clock)
    await keys.load()
    return keys


def read(signing: SigningKeys, *blobs: str, lifetime: float = 600) -> str:
    """Return a read token for these blobs; `lifetime` in seconds."""
    return signing.sign(Kind.READ, tokens.names_of(blobs), lifetime)


def bearer(text: str) -> dict[str, str]:
    """Return the header that shows a token."""
    return {"Authorization": f"Bearer {text}"}


def id_of(text: str) -> str:
    """Return a token's id, by which it can be revoked."""
    return tokens.parse(text).id
