"""What nodes and superpeers remember of tokens, keys and lies, where the disk takes it not: it holds for this run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dadi.errors import DigestMismatch, Malformed, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.peers import token as tokens
from dadi.peers.gate import Gate
from dadi.peers.keys import Keys, KnownKeys, PublicKey, PublicKeys
from dadi.peers.token import Kind
from dadi.peers.tokens import ImageTokens, Tokens
from superpeer.refused import Refused
from superpeer.shown_layers import ShownLayers
from superpeer.signing import SigningKeys
from tests.fakes.signing import A, Clock, bearer, clock, read, signing

__all__ = ["clock", "signing"]


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A path at which nothing can be read or written, also by root."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "remembered.json"


def kinds(fallbacks: Fallbacks) -> set[str]:
    return {row["kind"] for row in fallbacks.statistics()}


async def test_tokens_that_cannot_be_written_are_shown_and_what_is_told_of_it_shows_none(
    signing: SigningKeys, nowhere: Path
) -> None:
    fallbacks = Fallbacks()
    held = Tokens(fallbacks, file=nowhere)
    await held.load()
    token = read(signing, A)
    renewal = signing.sign(Kind.RENEWAL, tokens.names_of([A]), 5000, reference=f"r.example/a@{A}")
    await held.learn(ImageTokens(f"r.example/a@{A}", "linux/amd64", (token,), (renewal,)))
    assert held.headers(A) == bearer(token)
    assert kinds(fallbacks) == {"tokens could not be read", "tokens could not be written"}
    assert token not in str(fallbacks.statistics())
    assert renewal not in str(fallbacks.statistics())


async def test_keys_that_cannot_be_written_are_known(signing: SigningKeys, clock: Clock, nowhere: Path) -> None:
    async def fetch(url: str) -> PublicKeys:
        return signing.public()

    fallbacks = Fallbacks()
    keys = Keys(lambda: ["http://a"], fetch, fallbacks, clock=clock, file=nowhere)
    await keys.ask()
    Gate(keys, clock=clock).check(bearer(read(signing, A)), A)
    assert kinds(fallbacks) == {"keys could not be read", "keys could not be written"}


def test_an_answer_with_more_keys_than_any_superpeer_has_is_none() -> None:
    many = PublicKeys(keys=tuple(PublicKey("0" * 16, "") for _ in range(10_000)))
    with pytest.raises(Malformed, match="http://a names 10000 keys"):
        KnownKeys(many, "http://a")


async def test_an_index_that_lied_is_refused_though_that_cannot_be_written(nowhere: Path) -> None:
    refused = Refused(nowhere)
    await refused.load()
    await refused.add(A, "another tar")
    assert refused.has(A)
    with pytest.raises(DigestMismatch, match="another tar"):
        refused.check(A)


async def test_a_damaged_list_of_lies_stops_no_start_and_is_written_anew(tmp_path: Path) -> None:
    file = tmp_path / "refused-indexes.json"
    file.write_bytes(b'{"sha256:')
    refused = Refused(file)
    await refused.load()
    await refused.add(A, "another tar")
    again = Refused(file)
    await again.load()
    assert again.has(A)


@pytest.mark.parametrize("damaged", [b"", b"\xff", b'[{"canary": 1}]', b"[" * 100_000])
async def test_what_repositories_have_shown_is_lost_with_its_file_and_that_is_said(
    tmp_path: Path, damaged: bytes
) -> None:
    (tmp_path / "shown.json").write_bytes(damaged)
    fallbacks = Fallbacks()
    shown = ShownLayers(tmp_path / "shown.json", fallbacks)
    await shown.load()
    await shown.close()
    assert kinds(fallbacks) == {"what repositories have shown was lost"}
    assert "canary" not in str(fallbacks.statistics())


async def test_a_superpeer_that_cannot_write_its_key_does_not_sign_with_it(nowhere: Path, clock: Clock) -> None:
    """Nobody could tell its tokens after a restart."""
    with pytest.raises(Unavailable, match=r"cannot write .*keys\.json"):
        await SigningKeys(nowhere, lifetime=1000, keep=5000, clock=clock).load()
