"""Who is let in: a token opens the blobs that it names, for its time, unless it is revoked."""

from __future__ import annotations

from pathlib import Path

import pytest

from dadi.errors import AccessDenied, TokenRefused
from dadi.peers import token as tokens
from dadi.peers.gate import OPEN, Gate
from dadi.peers.token import LEEWAY, Kind
from superpeer.signing import SigningKeys
from tests.fakes.signing import A, B, Clock, bearer, clock, id_of, read, signing

__all__ = ["clock", "signing"]


async def test_a_token_opens_the_blobs_it_names(signing: SigningKeys, clock: Clock) -> None:
    gate = Gate(signing, clock=clock)
    for _ in range(3):
        gate.check(bearer(read(signing, A, B)), A, B)
    gate.check(bearer(read(signing, A)))
    assert gate.statistics() == {"admitted": 4, "refused": 0, "not_named": 0}


async def test_a_token_for_blob_a_does_not_open_blob_b(signing: SigningKeys, clock: Clock) -> None:
    gate = Gate(signing, clock=clock)
    text = read(signing, A)
    for blobs in ((B,), (A, B)):
        with pytest.raises(AccessDenied) as refused:
            gate.check(bearer(text), *blobs)
        assert refused.value.status == 403
    gate.check(bearer(text), A)


async def test_without_a_token_nobody_is_let_in(signing: SigningKeys, clock: Clock) -> None:
    gate = Gate(signing, clock=clock)
    for headers in ({}, {"Authorization": ""}, {"Authorization": "Basic dTpw"}, bearer("AAAA")):
        with pytest.raises(TokenRefused) as refused:
            await gate.admit(headers, A)
        assert refused.value.status == 401
    assert gate.statistics()["refused"] == 4


async def test_an_expired_token_stops_working_also_when_it_was_seen_before(signing: SigningKeys, clock: Clock) -> None:
    gate = Gate(signing, clock=clock)
    text = read(signing, A)
    gate.check(bearer(text), A)
    clock.now += 600 + LEEWAY
    with pytest.raises(TokenRefused, match="expired"):
        gate.check(bearer(text), A)


async def test_a_token_from_the_future_is_refused(signing: SigningKeys, clock: Clock) -> None:
    text = read(signing, A)
    clock.now -= 10 * LEEWAY
    with pytest.raises(TokenRefused, match="not valid yet"):
        Gate(signing, clock=clock).check(bearer(text), A)


async def test_a_renewal_does_not_pass_the_gate(signing: SigningKeys, clock: Clock) -> None:
    text = signing.sign(Kind.RENEWAL, tokens.names_of([A]), 600, reference="r.example/a@" + A)
    for blobs in ((A,), ()):
        with pytest.raises(TokenRefused, match="renewing"):
            Gate(signing, clock=clock).check(bearer(text), *blobs)


async def test_a_revoked_token_stops_working(signing: SigningKeys, clock: Clock, tmp_path: Path) -> None:
    gate = Gate(signing, clock=clock)
    text, other = read(signing, A), read(signing, A)
    gate.check(bearer(text), A)
    (tmp_path / "keys" / "revoked").write_text(f"# stolen\n{id_of(text)}\nnonsense\n")
    await signing.look()
    with pytest.raises(TokenRefused, match="revoked"):
        gate.check(bearer(text), A)
    gate.check(bearer(other), A)
    (tmp_path / "keys" / "revoked").unlink()
    await signing.look()
    gate.check(bearer(text), A)


async def test_all_tokens_from_before_a_time_can_be_revoked(
    signing: SigningKeys, clock: Clock, tmp_path: Path
) -> None:
    gate = Gate(signing, clock=clock)
    text = read(signing, A)
    clock.now += 10
    (tmp_path / "keys" / "revoked").write_text(f"before {int(clock.now)}\n")
    await signing.look()
    with pytest.raises(TokenRefused, match="revoked"):
        gate.check(bearer(text), A)
    gate.check(bearer(read(signing, A)), A)
    (tmp_path / "keys" / "revoked").write_text("before ²\nbefore soon\n")
    await signing.look()
    gate.check(bearer(text), A)  # a line that makes no sense revokes nothing, and breaks nothing


async def test_the_tokens_that_are_remembered_are_bounded(
    signing: SigningKeys, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dadi.peers.gate._MOST_SEEN", 3)
    gate = Gate(signing, clock=clock)
    for text in [read(signing, A) for _ in range(10)]:
        gate.check(bearer(text), A)
        assert len(gate._seen) <= 3


async def test_the_open_gate_lets_all_in() -> None:
    OPEN.check({}, A)
    await OPEN.admit({}, A)
