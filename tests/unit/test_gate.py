"""Who is let in, with which keys, and how a node keeps its tokens fresh.

Longer than 400 lines: what a node holds and what lets it in belong together here as they do there.
"""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi.errors import AccessDenied, ConfigError, Malformed, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.peers import token as tokens
from dadi.peers.gate import OPEN, Gate
from dadi.peers.keys import AT_MOST, WHILE, Keys, KnownKeys, PublicKey, PublicKeys
from dadi.peers.token import LEEWAY, Kind
from dadi.peers.tokens import ImageTokens, Needed, Tokens
from superpeer.signing import SigningKeys

A, B, C = ("sha256:" + letter * 64 for letter in "abc")


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

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
    return signing.sign(Kind.READ, tokens.names_of(blobs), lifetime)


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def id_of(text: str) -> str:
    return tokens.parse(text).id


# ---- the gate


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


# ---- keys


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


class Wall:
    def __init__(self) -> None:
        self.now = 5e8

    def __call__(self) -> float:
        return self.now


async def test_what_a_superpeer_has_signed_outlives_it_until_its_last_token_has_run_out(
    signing: SigningKeys, clock: Clock, tmp_path: Path
) -> None:
    other = SigningKeys(tmp_path / "other", clock=clock)
    await other.load()
    superpeers, wall = Superpeers(a=signing, b=other), Wall()
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


# ---- what a node holds


def image(signing: SigningKeys, *blobs: str, name: str = "r.example/a") -> ImageTokens:
    renewal = signing.sign(Kind.RENEWAL, tokens.names_of(blobs), 5000, reference=f"{name}@{A}")
    return ImageTokens(f"{name}@{A}", "linux/amd64", (read(signing, *blobs),), (renewal,))


async def test_a_node_shows_the_token_that_names_the_blob_and_never_the_renewal(signing: SigningKeys) -> None:
    held = Tokens(Fallbacks())
    first, second = image(signing, A, B), image(signing, C, name="r.example/b")
    await held.learn(first)
    await held.learn(second)
    assert held.headers(A) == held.headers(B) == bearer(first.tokens[0])
    assert held.headers(C) == bearer(second.tokens[0])
    assert held.headers("sha256:" + "0" * 64) == {}
    assert held.groups([A, C, B]) == [(bearer(first.tokens[0]), [A, B]), (bearer(second.tokens[0]), [C])]
    assert held.headers() in (bearer(first.tokens[0]), bearer(second.tokens[0]))


async def test_tokens_are_renewed_from_about_half_of_their_life_on_for_what_is_needed(
    signing: SigningKeys, clock: Clock
) -> None:
    held = Tokens(Fallbacks(), clock=clock)
    await held.learn(image(signing, A))
    await held.learn(image(signing, C, name="r.example/b"))
    renewed = []

    async def renew(old: ImageTokens) -> ImageTokens:
        renewed.append(old.reference)
        return image(signing, A)

    held.renew = renew
    needed = [Needed(f"r.example/a@{A}", "linux/amd64", (A,))]
    await held.renew_due(needed)
    assert renewed == []
    clock.now += 361
    before = held.headers(A)
    await held.renew_due(needed)
    await held.renew_due(needed)
    assert renewed == [f"r.example/a@{A}"]
    assert held.headers(A) != before


async def test_a_refused_token_is_renewed_once_whoever_waits(signing: SigningKeys) -> None:
    held = Tokens(Fallbacks())
    await held.learn(image(signing, A))
    calls = 0

    async def renew(old: ImageTokens) -> ImageTokens:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        return image(signing, A)

    held.renew = renew
    shown = held.text(A)
    waiting = [asyncio.create_task(held.renewed(A, shown)) for _ in range(20)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert all(await asyncio.gather(*waiting[1:]))
    assert calls == 1
    assert held.text(A) != shown
    assert await held.renewed(A, shown), "another is there already"
    assert calls == 1


async def test_while_no_superpeer_answers_a_renewal_is_unavailable_and_never_denied(signing: SigningKeys) -> None:
    fallbacks = Fallbacks()
    held = Tokens(fallbacks)
    await held.learn(image(signing, A))

    async def renew(old: ImageTokens) -> ImageTokens:
        raise Unavailable("away")

    held.renew = renew
    for _ in range(2):
        with pytest.raises(Unavailable):
            await held.renewed(A, held.text(A))
    assert fallbacks.statistics()[0]["kind"] == "tokens not renewed"


async def test_a_refusal_is_told_to_readers_and_not_asked_for_again_at_once(signing: SigningKeys, clock: Clock) -> None:
    held = Tokens(Fallbacks(), clock=clock)
    await held.learn(image(signing, A))
    calls = 0

    async def renew(old: ImageTokens) -> ImageTokens:
        nonlocal calls
        calls += 1
        raise AccessDenied("no more")

    held.renew = renew
    for _ in range(10):
        with pytest.raises(AccessDenied):
            await held.renewed(A, held.text(A))
    assert calls == 1
    assert held.statistics()["refused"] == 1
    clock.now += 60
    with pytest.raises(AccessDenied):
        await held.renewed(A, held.text(A))
    assert calls == 2


async def test_an_image_without_tokens_gets_some(signing: SigningKeys) -> None:
    held = Tokens(Fallbacks())

    async def renew(old: ImageTokens) -> ImageTokens:
        assert old.renewals == ()
        return image(signing, A)

    held.renew = renew
    assert not await held.renewed(A, None)
    await held.renew_due([Needed(f"r.example/a@{A}", "linux/amd64", (A,))])
    assert held.headers(A)


async def test_an_image_that_waits_for_its_first_tokens_hides_nobody_elses(signing: SigningKeys, clock: Clock) -> None:
    held = Tokens(Fallbacks(), clock=clock)
    await held.learn(image(signing, A))
    clock.now += 10_000
    await held.renew_due([Needed(f"r.example/b@{B}", "linux/amd64", (A, C))])
    text = held.text(A)
    assert text is not None
    assert held.headers() == held.headers(A) == bearer(text)
    assert held.text(C) is None
    assert held.image_with(C) == (f"r.example/b@{B}", "linux/amd64")
    assert held.image_with("sha256:" + "d" * 64) is None


async def test_tokens_survive_a_restart_in_a_file_that_is_ours_alone(signing: SigningKeys, tmp_path: Path) -> None:
    file = tmp_path / "node" / "tokens.json"
    held = Tokens(Fallbacks(), file=file)
    await held.learn(image(signing, A))
    assert file.stat().st_mode & 0o777 == 0o600
    again = Tokens(Fallbacks(), file=file)
    await again.load()
    assert again.headers(A) == held.headers(A)
    file.write_text('[["canary"')
    fallbacks = Fallbacks()
    await Tokens(fallbacks, file=file).load()
    assert "canary" not in str(fallbacks.statistics())
    assert fallbacks.statistics()[0]["kind"] == "tokens could not be read"


async def test_what_is_no_token_is_left_out(signing: SigningKeys) -> None:
    fallbacks = Fallbacks()
    held = Tokens(fallbacks)
    await held.learn(ImageTokens(f"r.example/a@{A}", "linux/amd64", ("nonsense",)))
    assert held.headers(A) == {}
    assert fallbacks.statistics()[0]["kind"] == "tokens that make no sense left out"


async def test_nothing_that_holds_secrets_shows_them(signing: SigningKeys) -> None:
    held = Tokens(Fallbacks())
    given = image(signing, A)
    await held.learn(given)
    shown = "".join(map(repr, (held, given, signing, signing._file, Gate(signing))))
    assert given.tokens[0] not in shown
    assert given.renewals[0] not in shown
    assert signing._file.private not in shown
