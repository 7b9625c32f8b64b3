"""The tokens that a node holds: which one it shows, renewed in time, refused, kept over a restart, shown to nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dadi.errors import AccessDenied, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.peers import token as tokens
from dadi.peers.gate import Gate
from dadi.peers.token import Kind
from dadi.peers.tokens import ImageTokens, Needed, Tokens
from superpeer.signing import SigningKeys
from tests.fakes.signing import A, B, C, Clock, bearer, clock, read, signing

__all__ = ["clock", "signing"]


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
