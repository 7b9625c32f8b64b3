"""What a node does to keep its access: renewals where a superpeer died, and the next credentials for refused ones."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from dadi import http
from dadi.blobs.source import Urgency
from dadi.errors import AccessDenied, DadiError, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import blob_of
from dadi.oci.credentials import Credentials, FixedCredentials
from dadi.oci.keychain import Keychain, PullSecrets
from dadi.oci.reference import Reference
from dadi.peers.line import Busy, HttpLine, RefusedAnew
from dadi.peers.superpeer import SuperpeerClient
from dadi.peers.token import Kind, names_of
from dadi.peers.tokens import ImageTokens, Tokens
from superpeer.signing import SigningKeys
from tests.contracts.store import C, content
from tests.fakes.registry import FakeRegistry
from tests.lab.network import free_ports
from tests.lab.services import PLATFORM, Running, running, tar_of

GOOD, WRONG, OLDER = Credentials("me", "secret"), Credentials("me", "wrong"), Credentials("me", "older")


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry(auth="basic", user="me", password="secret") as fake:
        fake.add_image("team/app", "1", [tar_of(a=b"a" * 50_000)])
        yield fake


@pytest.fixture
def own(tmp_path: Path, registry: FakeRegistry) -> Path:
    """The superpeer's own credentials."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {registry.host: {"auth": GOOD.basic.removeprefix("Basic ")}}}))
    return file


def held_by(run: Running) -> ImageTokens:
    (held,) = run.client.tokens._images.values()
    return held.image


@pytest.mark.parametrize("dead_first", [True, False])
async def test_where_the_superpeer_that_signed_has_died_a_renewal_is_asked_anew_of_its_stand_in(
    tmp_path: Path, registry: FakeRegistry, own: Path, dead_first: bool
) -> None:
    keychain = Keychain(FixedCredentials({registry.host: GOOD}))
    async with running(tmp_path / "a", registry.host, docker_config=own, credentials=keychain.credential) as run:
        await run.index(f"{registry.host}/team/app:1")
        held = held_by(run)
    (port,) = free_ports(1)
    async with running(tmp_path / "b", registry.host, docker_config=own) as stand_in:
        fallbacks = Fallbacks()
        client = SuperpeerClient([f"http://127.0.0.1:{port}", stand_in.url], fallbacks, connect=1, read=5,
                                 credentials=keychain.credential)  # fmt: skip
        client.superpeers.order = lambda key: sorted(
            client.superpeers.names, key=lambda name: (name == stand_in.url) == dead_first
        )
        try:
            assert (await client.access.renew(held)).tokens
            assert "renewal refused, asked anew" in [row["kind"] for row in fallbacks.statistics()]
        finally:
            await client.close()


async def test_while_the_superpeer_that_signed_is_away_a_node_without_credentials_waits_for_it(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    keychain = Keychain(FixedCredentials({registry.host: GOOD}))
    async with running(tmp_path / "a", registry.host, docker_config=own, credentials=keychain.credential) as run:
        await run.index(f"{registry.host}/team/app:1")
        held = held_by(run)
    (port,) = free_ports(1)
    async with running(tmp_path / "b", registry.host, docker_config=own) as stand_in:
        client = SuperpeerClient([f"http://127.0.0.1:{port}", stand_in.url], Fallbacks(), connect=1, read=5)
        try:
            with pytest.raises(Unavailable):
                await client.access.renew(held)
        finally:
            await client.close()


async def test_a_pull_secret_that_the_superpeers_registry_refuses_makes_room_for_good_credentials(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    reference = f"{registry.host}/team/app:1"
    app, pulls = Reference.parse(reference), PullSecrets()
    for credentials in (OLDER, WRONG):
        pulls.remember(app, credentials)
    keychain = Keychain(FixedCredentials({registry.host: GOOD}), pulls=pulls)
    async with running(tmp_path / "s", registry.host, docker_config=own, credentials=keychain.credential,
                       refused=keychain.refused) as run:  # fmt: skip
        await run.index(reference)
        assert await keychain.credential(app) == GOOD
        # The same where tokens are had without an image, and where the registry refuses what a renewal stems from.
        held = held_by(run)
        for image in (held, ImageTokens(held.reference, PLATFORM, ())):
            pulls.remember(app, Credentials("me", f"another {len(image.tokens)}"))
            assert (await run.client.access.renew(image)).tokens


async def test_credentials_that_are_all_refused_are_shown_once_each_and_the_registrys_no_is_told(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    reference = f"{registry.host}/team/app:1"
    app, pulls = Reference.parse(reference), PullSecrets()
    pulls.remember(app, WRONG)

    class Provider(FixedCredentials):
        """Says, whenever something is refused, that it knows better now."""

        def rejected(self, registry: str, repository: str, credentials: Credentials) -> bool:
            return True

    keychain = Keychain(Provider({registry.host: OLDER}), pulls=pulls)
    async with running(tmp_path / "s", registry.host, docker_config=own, credentials=keychain.credential,
                       refused=keychain.refused) as run:  # fmt: skip
        with pytest.raises(AccessDenied, match="refuses the node's credentials"):
            await run.image(reference)
        assert run.who_may.statistics()["no"] <= 3, "the two, and what anybody may"


async def test_a_token_that_is_refused_says_nothing_about_credentials(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    told: list[Credentials] = []
    keychain = Keychain(FixedCredentials({registry.host: GOOD}))
    async with running(tmp_path / "s", registry.host, docker_config=own, credentials=keychain.credential,
                       refused=lambda reference, credentials: bool(told.append(credentials))) as run:  # fmt: skip
        await run.index(f"{registry.host}/team/app:1")
        held = held_by(run)
        (tmp_path / "s" / "keys" / "revoked").write_text(run.who_may.public().keys[0].id)
        await run.who_may.keys.look()
        assert (await run.client.access.renew(held)).tokens
        with pytest.raises(AccessDenied):
            await run.image("not-allowed.example/team/app:1")
        assert told == []


class Nobody:
    """Hears nothing."""

    def begins(self) -> None:
        raise AssertionError

    def chunk(self, chunk: int, data: bytes, frame: bytes | None) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("renewed", "error"),
    [(True, RefusedAnew), (False, Busy)],
    ids=["refuses a fresh token", "no superpeer can renew it"],
)
async def test_a_peer_that_refuses_a_token_is_blamed_only_if_a_fresh_one_is_no_better(
    tmp_path: Path, renewed: bool, error: type[DadiError]
) -> None:
    shown: list[str] = []

    async def refuse(request: web.Request) -> web.Response:
        shown.append(request.headers["Authorization"])
        raise TokenRefused("signed with a key that is not known here")

    keys = SigningKeys(tmp_path)
    await keys.load()
    blob = blob_of(content(C), C)

    def image() -> ImageTokens:
        return ImageTokens(f"r.example/a@{blob.digest}", PLATFORM, (keys.sign(Kind.READ, names_of([blob.digest]), 60),))

    async def renew(image_: ImageTokens) -> ImageTokens:
        if not renewed:
            raise Unavailable("nobody there")
        return image()

    tokens = Tokens(Fallbacks())
    tokens.renew = renew
    await tokens.learn(image())
    app = http.application()
    app.router.add_get("/v1/blobs/{digest}", refuse)
    runner, address = await http.serve_tcp(app, "127.0.0.1:0")
    session = http.client()
    try:
        line = HttpLine(lambda: f"http://{address}", session, tokens=tokens)
        with pytest.raises(DadiError) as caught:
            await line.ask(blob, range(1), Urgency.DEMAND, 0, Nobody())
        assert type(caught.value) is error
        assert len(set(shown)) == (2 if renewed else 1)
    finally:
        await session.close()
        await runner.cleanup()
        await tokens.close()
