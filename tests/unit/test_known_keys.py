"""The keys that a node knows: asked for when a token has an unknown one, kept while their superpeer is away."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi.errors import Malformed, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.peers.gate import Gate
from dadi.peers.keys import AT_MOST, WHILE, Keys, KnownKeys, PublicKey, PublicKeys
from superpeer.signing import SigningKeys
from tests.fakes.signing import A, Clock, bearer, clock, id_of, read, signing

__all__ = ["clock", "signing"]


class Superpeers:
    """Answers for /v1/keys by URL."""

    def __init__(self, **answers: SigningKeys | Exception) -> None:
        self.answers = {f"http://{name}": answer for name, answer in answers.items()}
        self.asked = 0

    async def fetch(self, url: str) -> PublicKeys:
        self.asked += 1
        answer = self.answers[url]
        if isinstance(answer, Exception):
            raise answer
        return answer.public()

    def keys(self, clock: Clock, **options: object) -> Keys:
        return Keys(lambda: self.answers, self.fetch, Fallbacks(), clock=clock, **options)


async def test_a_node_asks_for_a_key_that_it_does_not_know(signing: SigningKeys, clock: Clock) -> None:
    superpeers = Superpeers(a=signing)
    gate = Gate(superpeers.keys(clock), clock=clock)
    await asyncio.gather(*(gate.admit(bearer(read(signing, A)), A) for _ in range(20)))
    assert superpeers.asked == 1, "whoever waits, waits for the same answer"


async def test_strangers_cannot_have_superpeers_asked_over_and_over(
    signing: SigningKeys, clock: Clock, tmp_path: Path
) -> None:
    stranger = SigningKeys(tmp_path / "stranger", clock=clock)
    await stranger.load()
    superpeers = Superpeers(a=signing)
    gate = Gate(superpeers.keys(clock), clock=clock)
    for _ in range(50):
        with pytest.raises(TokenRefused, match="not known"):
            await gate.admit(bearer(read(stranger, A)), A)
    assert superpeers.asked == AT_MOST
    clock.now += WHILE
    with pytest.raises(TokenRefused):
        await gate.admit(bearer(read(stranger, A)), A)
    assert superpeers.asked == AT_MOST + 1


async def test_keys_stay_known_while_the_superpeer_is_away_and_that_is_said(signing: SigningKeys, clock: Clock) -> None:
    superpeers = Superpeers(a=signing)
    keys = superpeers.keys(clock)
    await keys.ask()
    superpeers.answers["http://a"] = Unavailable("away")
    await keys.ask()
    Gate(keys, clock=clock).check(bearer(read(signing, A)), A)
    assert keys._fallbacks.statistics()[0]["kind"] == "keys not renewed, known ones used"


async def test_what_a_superpeer_revokes_its_peers_refuse(signing: SigningKeys, clock: Clock, tmp_path: Path) -> None:
    superpeers = Superpeers(a=signing)
    keys = superpeers.keys(clock)
    gate = Gate(keys, clock=clock)
    text = read(signing, A)
    await gate.admit(bearer(text), A)
    (tmp_path / "keys" / "revoked").write_text(id_of(text))
    await signing.look()
    await keys.ask()
    with pytest.raises(TokenRefused, match="revoked"):
        gate.check(bearer(text), A)


async def test_a_key_that_its_superpeer_drops_is_dropped(signing: SigningKeys, clock: Clock, tmp_path: Path) -> None:
    superpeers = Superpeers(a=signing)
    keys = superpeers.keys(clock)
    gate = Gate(keys, clock=clock)
    text = read(signing, A)
    await gate.admit(bearer(text), A)
    fresh = superpeers.answers["http://a"] = SigningKeys(tmp_path / "fresh", clock=clock)
    await fresh.load()
    await keys.ask()
    with pytest.raises(TokenRefused):
        gate.check(bearer(text), A)


async def test_what_a_superpeer_has_signed_outlives_it_until_its_last_token_has_run_out(
    signing: SigningKeys, clock: Clock, tmp_path: Path
) -> None:
    other = SigningKeys(tmp_path / "other", clock=clock)
    await other.load()
    superpeers, wall = Superpeers(a=signing, b=other), Clock(5e8)
    options = {"file": tmp_path / "known.json", "keep": 1000, "wall": wall}
    keys = superpeers.keys(clock, **options)
    await keys.ask()
    gone = superpeers.answers.pop("http://a")  # its name is not in DNS any more
    for _ in range(3):
        wall.now += 300
        await keys.ask()
        Gate(keys, clock=clock).check(bearer(read(signing, A)), A)
    again = superpeers.keys(clock, **options)
    await again.ask()
    Gate(again, clock=clock).check(bearer(read(signing, A)), A)
    wall.now += 400
    await again.ask()
    with pytest.raises(TokenRefused):
        Gate(again, clock=clock).check(bearer(read(signing, A)), A)
    superpeers.answers["http://a"] = gone
    await again.ask()
    Gate(again, clock=clock).check(bearer(read(signing, A)), A)


async def test_keys_are_known_after_a_restart_while_their_superpeer_is_away(
    signing: SigningKeys, clock: Clock, tmp_path: Path
) -> None:
    superpeers, file = Superpeers(a=signing), tmp_path / "known.json"
    await superpeers.keys(clock, file=file).ask()
    superpeers.answers["http://a"] = Unavailable("away")
    await Gate(superpeers.keys(clock, file=file), clock=clock).admit(bearer(read(signing, A)), A)
    for damaged in (b"", b"\xff", b'{"http://a": {"said": {"keys": [{"id": "x", "key": "y"}]}}}'):
        file.write_bytes(damaged)
        keys = superpeers.keys(clock, file=file)
        await keys.ask()
        assert keys.find(signing.public().keys[0].id) is None
        assert "keys could not be read" in [row["kind"] for row in keys._fallbacks.statistics()]


async def test_superpeers_pass_on_the_keys_of_their_siblings_one_hop_far(
    signing: SigningKeys, clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "keys" / "revoked").write_text(id_of(revoked := read(signing, A)))
    await signing.look()
    superpeers = Superpeers(a=signing)
    sibling = superpeers.keys(clock)
    await sibling.ask()
    told = sibling.with_siblings(PublicKeys(()))

    async def fetch(url: str) -> PublicKeys:
        return told

    keys = Keys(lambda: ["http://b"], fetch, Fallbacks(), clock=clock)
    await keys.ask()
    gate = Gate(keys, clock=clock)
    gate.check(bearer(read(signing, A)), A)
    with pytest.raises(TokenRefused, match="revoked"):
        gate.check(bearer(revoked), A)
    assert keys.with_siblings(PublicKeys(())).siblings == (PublicKeys(()),)


async def test_more_of_siblings_than_an_answer_may_have_is_not_passed_on(clock: Clock) -> None:
    async def fetch(url: str) -> PublicKeys:
        return PublicKeys((), tuple(f"{url}{n}" for n in range(6000)))

    keys = Keys(lambda: ["a", "b"], fetch, Fallbacks(), clock=clock)
    await keys.ask()
    told = keys.with_siblings(PublicKeys(()))
    assert len(told.siblings) == 1
    KnownKeys(told, "here")
    assert [row["kind"] for row in keys._fallbacks.statistics()] == ["keys of a sibling not passed on"]


async def test_all_that_a_key_signed_can_be_revoked_at_another_superpeer(
    signing: SigningKeys, clock: Clock, tmp_path: Path
) -> None:
    other = SigningKeys(tmp_path / "other", clock=clock)
    await other.load()
    (tmp_path / "other" / "revoked").write_text(signing.public().keys[0].id)
    await other.look()
    keys = Superpeers(a=signing, b=other).keys(clock)
    await keys.ask()
    gate = Gate(keys, clock=clock)
    gate.check(bearer(read(other, A)), A)
    with pytest.raises(TokenRefused, match="revoked"):
        gate.check(bearer(read(signing, A)), A)


async def test_strangers_with_invented_keys_hold_up_a_new_one_for_seconds_only(
    signing: SigningKeys, clock: Clock, tmp_path: Path
) -> None:
    stranger, fresh = (SigningKeys(tmp_path / name, clock=clock) for name in ("stranger", "fresh"))
    await stranger.load()
    await fresh.load()
    superpeers = Superpeers(a=signing)
    gate = Gate(superpeers.keys(clock), clock=clock)
    for _ in range(AT_MOST):
        with pytest.raises(TokenRefused):
            await gate.admit(bearer(read(stranger, A)), A)
    superpeers.answers["http://a"] = fresh
    with pytest.raises(TokenRefused):
        await gate.admit(bearer(read(fresh, A)), A)
    clock.now += WHILE / AT_MOST
    await gate.admit(bearer(read(fresh, A)), A)


@pytest.mark.parametrize("key", ["", "AAAA", "not base64!", base64.b64encode(bytes(31)).decode()])
async def test_answers_that_are_no_keys_are_left_out(key: str, clock: Clock) -> None:
    async def fetch(url: str) -> PublicKeys:
        return PublicKeys((PublicKey("00" * 8, key),))

    fallbacks = Fallbacks()
    keys = Keys(lambda: ["http://a"], fetch, fallbacks, clock=clock)
    await keys.ask()
    assert keys.find("00" * 8) is None
    assert fallbacks.statistics()


async def test_a_superpeer_cannot_give_its_key_the_id_of_another(signing: SigningKeys, clock: Clock) -> None:
    mine = Ed25519PrivateKey.generate().public_key()
    claimed = PublicKey(signing.public().keys[0].id, base64.b64encode(mine.public_bytes_raw()).decode())

    async def fetch(url: str) -> PublicKeys:
        return PublicKeys((claimed,))

    keys = Keys(lambda: ["http://a"], fetch, Fallbacks(), clock=clock)
    await keys.ask()
    assert keys.find(claimed.id) is None
    with pytest.raises(Malformed):
        KnownKeys(PublicKeys((claimed,)), "a")
