"""The keys that a superpeer signs with: kept private, rotated, shared; and what became of what they signed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi.errors import ConfigError, TokenRefused
from dadi.peers import token as tokens
from dadi.peers.gate import Gate
from superpeer.signing import SigningKeys
from tests.fakes.signing import A, Clock, bearer, clock, read, signing

__all__ = ["clock", "signing"]


async def test_keys_are_private_and_the_same_after_a_restart(
    signing: SigningKeys, tmp_path: Path, clock: Clock
) -> None:
    file = tmp_path / "keys" / "keys.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    again = SigningKeys(tmp_path / "keys", clock=clock)
    await again.load()
    assert again.public() == signing.public()
    assert again.grant("x", "r/a") == signing.grant("x", "r/a") != signing.grant("x", "r/b")


async def test_two_superpeers_have_two_keys(signing: SigningKeys, tmp_path: Path) -> None:
    other = SigningKeys(tmp_path / "other")
    await other.load()
    assert other.public().keys[0].id != signing.public().keys[0].id


async def test_keys_rotate_and_what_the_old_one_signed_stays_good_until_it_has_expired(
    signing: SigningKeys, clock: Clock
) -> None:
    gate = Gate(signing, clock=clock)
    text = read(signing, A, lifetime=4000)
    old = signing.public().keys[0].id
    clock.now += 1000
    await signing.look()
    assert [key.id for key in signing.public().keys][1:] == [old]
    assert tokens.parse(read(signing, A)).key != old
    gate.check(bearer(text), A)
    Gate(signing, clock=clock).check(bearer(text), A)
    clock.now += 5000
    await signing.look()
    assert old not in [key.id for key in signing.public().keys]
    with pytest.raises(TokenRefused):
        Gate(signing, clock=clock).check(bearer(text), A)


async def test_a_private_key_that_signs_no_more_is_not_kept(signing: SigningKeys, tmp_path: Path, clock: Clock) -> None:
    before = (tmp_path / "keys" / "keys.json").read_text()
    private = before.split('"private":"')[1].split('"')[0]
    clock.now += 1000
    await signing.look()
    assert private not in (tmp_path / "keys" / "keys.json").read_text()


async def test_superpeers_may_share_a_key_and_take_a_new_one_from_its_file(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "shared.pem"

    def write(key: Ed25519PrivateKey) -> str:
        path.with_suffix(".new").write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))  # fmt: skip
        path.with_suffix(".new").rename(path)
        return tokens.key_id(key.public_key())

    first = write(Ed25519PrivateKey.generate())
    both = [SigningKeys(tmp_path / name, peers_key=str(path), lifetime=1, clock=clock) for name in "ab"]
    for keys in both:
        await keys.load()
    assert both[0].grant("x", "r/a") == both[1].grant("x", "r/a")
    gate = Gate(both[1], clock=clock)
    text = read(both[0], A)
    gate.check(bearer(text), A)
    clock.now += 100
    second = write(Ed25519PrivateKey.generate())
    for keys in both:
        await keys.look()
        assert [key.id for key in keys.public().keys] == [second, first]
    gate.check(bearer(text), A)
    path.write_text("canary")
    with pytest.raises(ConfigError) as refused:
        await both[0].look()
    assert "canary" not in str(refused.value)
    assert tokens.parse(read(both[0], A)).key == second


async def test_a_damaged_key_file_is_said_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"private": "c2VjcmV0LWNhbmFyeQ==", "made": 1, "secret": "x"}')
    with pytest.raises(ConfigError, match="damaged") as refused:
        await SigningKeys(tmp_path).load()
    assert "c2VjcmV0" not in str(refused.value)
