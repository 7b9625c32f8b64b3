"""Who may have an image: the registry says, tokens say it again, and a running container never notices.

Longer than 400 lines: all ways to a token, and to none, with one superpeer and one registry.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from dadi.errors import AccessDenied, InvalidRequest, NotFound, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.oci.credentials import Credentials
from dadi.oci.reference import Reference
from dadi.peers import shown
from dadi.peers import token as tokens
from dadi.peers.gate import Gate
from dadi.peers.keys import Keys
from dadi.peers.superpeer import SuperpeerClient
from dadi.prefetch.messages import Request
from superpeer.verdicts import NO_FOR
from tests.fakes.registry import FakeRegistry, status
from tests.lab.access import GOOD, WRONG, Clock, Node, client_of, held, image, own_credentials, private_registry, value
from tests.lab.services import PLATFORM, Running, running, tar_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with private_registry() as fake:
        yield fake


@pytest.fixture
async def public() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [tar_of(a=b"a" * 50_000)])
        yield fake


@pytest.fixture
def own(tmp_path: Path, registry: FakeRegistry) -> Path:
    return own_credentials(tmp_path / "config.json", registry)


async def test_a_private_image_is_given_to_whom_the_registry_gives_it_and_to_nobody_else(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    reference = f"{registry.host}/team/app:1"
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential) as run:
        index = await run.index(reference)
        read = await run.client.source.read(index.layers[0].blob, range(index.layers[0].table.count))
        assert b"".join(read) == tar_of(a=b"a" * 50_000)
        for credentials in (None, WRONG):
            async with client_of(run, credentials) as stranger:
                with pytest.raises(AccessDenied):
                    await image(stranger, reference)
                with pytest.raises(TokenRefused):
                    await stranger.source.read(index.layers[0].blob, range(1))
                with pytest.raises(TokenRefused):
                    await stranger.whole(index.layers[0].index_digest, index.layers[0].index_size)
        async with client_of(run, GOOD) as colleague:
            await image(colleague, f"{registry.host}/team/other:1")
            with pytest.raises(TokenRefused):
                await colleague.source.read(index.layers[0].blob, range(1))


async def test_blobs_need_a_token_that_names_them(tmp_path: Path, registry: FakeRegistry, own: Path) -> None:
    node = Node(GOOD)
    async with (
        running(tmp_path, registry.host, docker_config=own, credentials=node.credential) as run,
        aiohttp.ClientSession() as session,
    ):
        index, other = await run.index(f"{registry.host}/team/app:1"), await run.index(f"{registry.host}/team/other:1")
        url = f"{run.url}/v1/blobs/{index.layers[0].diff_id}"
        right = run.client.tokens.headers(index.layers[0].diff_id)
        renewal = next(iter(run.client.tokens._images.values())).image.renewals[0]
        for headers, code in [
            ({}, 401),
            (right, 200),
            (run.client.tokens.headers(other.layers[0].diff_id), 403),
            ({"Authorization": f"Bearer {renewal}"}, 401),
            ({"Authorization": GOOD.basic}, 401),
            ({"Authorization": "Bearer é".encode("latin-1").decode("latin-1")}, 401),
        ]:
            for method in ("GET", "HEAD"):
                async with session.request(method, url, headers=headers) as response:
                    assert response.status == code, (method, code)
        # Who has no token is not told either which blobs there are.
        async with session.get(f"{run.url}/v1/blobs/sha256:{'0' * 64}") as response:
            assert response.status == 401


@pytest.mark.parametrize("value", ["nonsense", "Basic !!", "Basic " + "a" * 7000, "Basic bm8tY29sb24="])
async def test_malformed_credentials_are_refused_before_anybody_is_asked(
    tmp_path: Path, registry: FakeRegistry, own: Path, value: str
) -> None:
    async with running(tmp_path, registry.host, docker_config=own) as run, aiohttp.ClientSession() as session:
        parameters = {"reference": f"{registry.host}/team/app:1", "platform": PLATFORM}
        async with session.get(f"{run.url}/v1/token", params=parameters, headers={shown.HEADER: value}) as response:
            assert response.status == 400
            assert value not in await response.text()
        assert registry.seen == []


async def test_a_thousand_nodes_cost_the_registry_one_question(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    async with running(tmp_path, registry.host, docker_config=own) as run:
        reference = Reference.parse(f"{registry.host}/team/app:1")
        value = shown.header(GOOD)[shown.HEADER]
        grants = await asyncio.gather(*(run.who_may.check(reference, value) for _ in range(1000)))
        assert len(set(grants)) == 1
        assert run.who_may.statistics()["asked"] == 1
        assert len([seen for seen in registry.asked("/manifests/", "HEAD") if seen.authorization]) == 1
        for _ in range(10):
            await run.who_may.check(reference, value)
        assert run.who_may.statistics()["asked"] == 1


async def test_what_anybody_may_read_is_asked_once_whoever_comes(tmp_path: Path, public: FakeRegistry) -> None:
    async with running(tmp_path, public.host) as run:
        reference = f"{public.host}/team/app:1"
        await run.image(reference)
        asked = run.who_may.statistics()["asked"]
        for credentials in (None, GOOD, WRONG):
            async with client_of(run, credentials) as client:
                await image(client, reference)
        assert run.who_may.statistics()["asked"] == asked == 1


async def test_a_no_is_not_asked_for_over_and_over_and_not_believed_for_long(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock
) -> None:
    async with running(tmp_path, registry.host, docker_config=own, clock=clock) as run:
        reference = Reference.parse(f"{registry.host}/team/app:1")
        value = shown.header(WRONG)[shown.HEADER]
        for _ in range(10):
            with pytest.raises(AccessDenied):
                await run.who_may.check(reference, value)
        assert run.who_may.statistics()["asked"] == 1
        registry.password = "wrong"
        clock.ahead += NO_FOR
        await run.who_may.check(reference, value)


async def test_a_yes_for_one_repository_is_none_for_another(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    async with running(tmp_path, registry.host, docker_config=own) as run:
        value = shown.header(GOOD)[shown.HEADER]
        await run.who_may.check(Reference.parse(f"{registry.host}/team/app:1"), value)
        await run.who_may.check(Reference.parse(f"{registry.host}/team/other:1"), value)
        assert run.who_may.statistics()["asked"] == 2


async def test_while_the_registry_is_away_a_yes_stays_one_for_a_day_and_that_is_said(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock
) -> None:
    async with running(tmp_path, registry.host, docker_config=own, clock=clock) as run:
        reference = Reference.parse(f"{registry.host}/team/app:1")
        value = shown.header(GOOD)[shown.HEADER]
        first = await run.who_may.check(reference, value)
        registry.script("/manifests/", *[status(503)] * 1000)
        clock.ahead += 3600
        assert await run.who_may.check(reference, value) == first, "not a new yes"
        assert "registry away, access as it was" in [row["kind"] for row in run.superpeer.fallbacks.statistics()]
        asked = run.who_may.statistics()["asked"]
        for _ in range(20):
            await run.who_may.check(reference, value)
        assert run.who_may.statistics()["asked"] == asked, "not asked again at once"
        with pytest.raises(Unavailable):
            await run.who_may.check(reference, shown.header(WRONG)[shown.HEADER])
        clock.ahead += 86400
        with pytest.raises(Unavailable):
            await run.who_may.check(reference, value)


async def test_what_the_registry_said_is_known_after_a_restart_without_it_and_no_credential_is_on_disk(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    reference = f"{registry.host}/team/app:1"
    node = Node(GOOD)
    options = {"docker_config": own, "credentials": node.credential, "tag_ttl": 0.0}
    async with running(tmp_path / "state", registry.host, **options) as run:
        before = await run.index(reference)
    registry.script("/", *[status(503)] * 1000)
    async with running(tmp_path / "state", registry.host, authorization_ttl=0.0, **options) as run:
        assert await run.index(reference) == before
    data = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert b"secret" not in data.replace(b'"secret":', b"")
    assert GOOD.basic.removeprefix("Basic ").encode() not in data


def rested(run: Running) -> None:
    """Have the client forget that it has renewed its tokens just now: its clock stands still here."""
    for each in run.client.tokens._images.values():
        each.tried_at = float("-inf")


async def read_all(run: Running, index: object) -> None:
    for layer in index.layers:
        await run.client.source.read(layer.blob, range(layer.table.count))


async def test_a_running_container_does_not_notice_that_its_token_expires(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential, clock=clock) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        for _ in range(3):
            clock.ahead += 3600
            rested(run)
            await asyncio.gather(*(read_all(run, index) for _ in range(5)))
        assert run.client.tokens.statistics()["renewed"] == 3
        assert run.client.access._fallbacks.statistics() == []


@pytest.mark.parametrize("why", ["registry away", "credentials lost", "other credentials", "image deleted"])
async def test_a_running_container_keeps_its_reads_for_a_day_when_the_registry_cannot_say(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock, why: str
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential, clock=clock) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        if why == "registry away":
            registry.script("/", *[status(503)] * 1000)
        elif why == "credentials lost":
            node.credentials = None
        elif why == "other credentials":
            node.credentials = WRONG
        else:
            registry.manifests.clear()
        for _ in range(5):
            clock.ahead += 4 * 3600
            rested(run)
            await read_all(run, index)
        kinds = {row["kind"] for row in run.superpeer.fallbacks.statistics()}
        assert kinds & {"token renewed, the registry cannot say", "token renewed without the credentials of then",
                        "registry away, access as it was"}, kinds  # fmt: skip
        clock.ahead += 5 * 3600
        rested(run)
        with pytest.raises((AccessDenied, NotFound, Unavailable)):
            await read_all(run, index)


async def test_whom_the_registry_refuses_meanwhile_is_out_when_the_token_has_run_out(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential, clock=clock) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        registry.password = "changed"
        await read_all(run, index)
        clock.ahead += 700
        with pytest.raises(AccessDenied):
            await read_all(run, index)
        # Nor does it help to hide the credentials now.
        node.credentials = None
        rested(run)
        with pytest.raises(AccessDenied):
            await read_all(run, index)
        # With credentials that the registry accepts all is well again.
        node.credentials = Credentials("me", "changed")
        rested(run)
        await read_all(run, index)


async def test_a_read_token_renews_nothing_and_a_strangers_renewal_neither(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    async with (
        running(tmp_path / "a", registry.host, docker_config=own, credentials=node.credential) as run,
        running(tmp_path / "b", registry.host, docker_config=own, credentials=node.credential) as other,
        aiohttp.ClientSession() as session,
    ):
        reference = f"{registry.host}/team/app:1"
        for each in (run, other):
            await each.image(reference)
        stranger = next(iter(other.client.tokens._images.values())).image.renewals[0]
        read = next(iter(run.client.tokens._images.values())).image.tokens[0]
        for text in (stranger, read, "AAAA"):
            headers = {"Authorization": f"Bearer {text}", **shown.header(GOOD)}
            parameters = {"reference": reference, "platform": PLATFORM}
            async with session.get(f"{run.url}/v1/token", params=parameters, headers=headers) as response:
                assert response.status == 401


async def test_a_renewal_is_for_its_own_image_whatever_is_asked_for(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    async with (
        running(tmp_path, registry.host, docker_config=own, credentials=node.credential) as run,
        aiohttp.ClientSession() as session,
    ):
        index = await run.index(f"{registry.host}/team/app:1")
        renewal = next(iter(run.client.tokens._images.values())).image.renewals[0]
        other = await run.index(f"{registry.host}/team/other:1")
        parameters = {"reference": f"{registry.host}/team/other:1", "platform": PLATFORM}
        headers = {"Authorization": f"Bearer {renewal}"}
        async with session.get(f"{run.url}/v1/token", params=parameters, headers=headers) as response:
            (text,) = (await response.json())["tokens"]
        assert tokens.parse(text).opens(index.layers[0].diff_id)
        assert not tokens.parse(text).opens(other.layers[0].diff_id)


async def test_peers_check_tokens_with_the_superpeers_keys_and_learn_of_new_ones(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential, clock=clock) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        diff_id = index.layers[0].diff_id
        keys = Keys(lambda: [run.url], run.client.access.fetch_keys, Fallbacks())
        gate = Gate(keys, clock=clock)
        await gate.admit(run.client.tokens.headers(diff_id), diff_id)
        with pytest.raises(AccessDenied):
            await gate.admit(run.client.tokens.headers(diff_id), "sha256:" + "0" * 64)
        with pytest.raises(TokenRefused):
            await gate.admit({}, diff_id)
        clock.ahead += 8 * 86400
        await run.who_may.keys.look()
        assert run.who_may.statistics()["rotations"] == 1
        await read_all(run, index)  # another token by now
        await gate.admit(run.client.tokens.headers(diff_id), diff_id)


async def test_a_sibling_that_knows_the_key_accepts_the_token(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    options = {"docker_config": own, "credentials": node.credential}
    async with (
        running(tmp_path / "a", registry.host, **options) as run,
        running(tmp_path / "b", registry.host, **options) as sibling,
    ):
        index = await run.index(f"{registry.host}/team/app:1")
        diff_id = index.layers[0].diff_id
        headers = run.client.tokens.headers(diff_id)
        with pytest.raises(TokenRefused):
            await sibling.who_may.gate.admit(headers, diff_id)
        fetch = run.client.access.fetch_keys
        sibling.who_may.trust(Keys(lambda: [run.url], fetch, Fallbacks(), own=sibling.who_may.keys))
        await sibling.who_may.gate.admit(headers, diff_id)
        await sibling.who_may.gate.admit(run.who_may.sibling_headers(diff_id), diff_id)
        await sibling.image(f"{registry.host}/team/app:1")
        await sibling.who_may.gate.admit(sibling.client.tokens.headers(diff_id), diff_id)


async def test_an_open_superpeer_asks_nobody_and_gives_tokens_for_peers(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    async with (
        running(tmp_path, registry.host, docker_config=own, authorization="open") as run,
        aiohttp.ClientSession() as session,
    ):
        index = await run.index(f"{registry.host}/team/app:1")
        assert run.client.tokens.headers(index.layers[0].diff_id)
        async with session.get(f"{run.url}/v1/blobs/{index.layers[0].diff_id}") as response:
            assert response.status == 200
        assert run.who_may.statistics()["asked"] == 0


async def test_credentials_are_shown_to_the_registry_of_the_reference_only(
    tmp_path: Path, registry: FakeRegistry, public: FakeRegistry, own: Path
) -> None:
    async with running(tmp_path, registry.host, docker_config=own) as run, client_of(run, GOOD) as client:
        with pytest.raises(AccessDenied):
            await image(client, f"{public.host}/team/app:1")
        assert public.seen == [], "it is not among the allowed ones"
        await image(client, f"{registry.host}/team/app:1")
        assert public.seen == []


async def test_the_image_event_is_free_of_tokens_once_it_has_come(
    tmp_path: Path, public: FakeRegistry
) -> None:
    async with running(tmp_path, public.host) as run:
        event = await image(run.client, f"{public.host}/team/app:1")
        assert not {"tokens", "renewals", "token"} & event.keys()


async def test_an_image_of_many_layers_gets_several_tokens(tmp_path: Path, public: FakeRegistry) -> None:
    public.add_image("team/many", "1", [tar_of(**{f"f{n}": b"%d" % n}) for n in range(130)])
    async with running(tmp_path, public.host) as run:
        index = await run.index(f"{public.host}/team/many:1")
        held = next(iter(run.client.tokens._images.values())).image
        assert len(held.tokens) == len(held.renewals) > 1
        assert len(run.client.tokens.groups(layer.diff_id for layer in index.layers)) == 1
        await read_all(run, index)
        shown_before = run.client.tokens.text(index.layers[0].diff_id)
        fresh = await run.client.access.renew(held)
        assert len(fresh.tokens) == len(held.tokens)
        assert shown_before


async def test_tokens_can_be_had_again_without_a_renewal(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        held = next(iter(run.client.tokens._images.values())).image
        client = SuperpeerClient([run.url], Fallbacks(), connect=3, read=10, credentials=node.credential)
        try:
            bare = type(held)(held.reference, held.platform, ())
            assert tokens.parse((await client.access.renew(bare)).tokens[0]).opens(index.layers[0].diff_id)
            node.credentials = None
            with pytest.raises(AccessDenied):
                await client.access.renew(bare)
        finally:
            await client.close()


async def test_requests_without_a_reference_are_refused(tmp_path: Path, public: FakeRegistry) -> None:
    async with running(tmp_path, public.host) as run:
        with pytest.raises(InvalidRequest):
            await run.image("")


async def test_to_revoke_a_renewal_ends_all_that_comes_of_it(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential, clock=clock) as run:
        await run.index(f"{registry.host}/team/app:1")
        first = held(run.client)
        clock.ahead += 600
        later = await run.client.access.renew(await run.client.access.renew(first))
        assert later.renewals != first.renewals
        (tmp_path / "keys" / "revoked").write_text(tokens.parse(first.renewals[0]).id + "\n")
        await run.who_may.keys.look()
        for text in (*first.renewals, *later.renewals):
            with pytest.raises(TokenRefused, match="revoked"):
                await run.who_may.renew({"Authorization": f"Bearer {text}"}, value(GOOD))


async def test_what_was_given_while_all_was_open_is_not_renewed_when_it_is_closed(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    reference = f"{registry.host}/team/app:1"
    async with running(tmp_path, registry.host, docker_config=own, authorization="open") as run:
        await run.index(reference)
        given = held(run.client)
    node = Node(None)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential) as run:
        with pytest.raises(TokenRefused):
            await run.who_may.renew({"Authorization": f"Bearer {given.renewals[0]}"}, None)
        with pytest.raises(AccessDenied):
            await run.client.access.renew(given)
        node.credentials = GOOD
        assert (await run.client.access.renew(given)).tokens


async def test_the_list_of_images_is_for_siblings_and_reasons_are_for_who_has_a_token(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    async with (
        running(tmp_path, registry.host, docker_config=own, credentials=node.credential) as run,
        aiohttp.ClientSession() as session,
    ):
        index = await run.index(f"{registry.host}/team/app:1")
        run.superpeer.fallbacks.note("something", f"{registry.host}/team/app:1")
        read = run.client.tokens.headers(index.layers[0].diff_id)
        for headers, code in [({}, 401), (read, 401), (run.who_may.sibling_headers(index.layers[0].diff_id), 401),
                              (run.who_may.sibling_list_headers(), 200)]:  # fmt: skip
            async with session.get(f"{run.url}/sibling/v1/images", headers=headers) as response:
                assert response.status == code
        for headers, told in [({}, False), (read, True)]:
            async with session.get(f"{run.url}/v1/status", headers=headers) as response:
                assert ("team/app" in await response.text()) is told


async def test_a_list_of_jobs_shows_credentials_to_the_registry_that_they_are_meant_for(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    async with (
        FakeRegistry() as other,
        running(tmp_path, registry.host, other.host, docker_config=own) as run,
        aiohttp.ClientSession() as session,
    ):
        other.add_image("any/app", "1", [tar_of(z=b"z")])
        for reference in (f"{registry.host}/team/app:1", f"{other.host}/any/app:1"):
            await run.superpeer.prefetch.submit(Request(reference, PLATFORM))
        found = {}
        for meant in ("", registry.host, other.host):
            async with session.get(f"{run.url}/v1/prefetch", params={"registry": meant},
                                   headers=shown.header(GOOD)) as response:  # fmt: skip
                found[meant] = {job["request"]["reference"] for job in (await response.json())["jobs"]}
            if meant != other.host:
                assert not [seen for seen in other.seen if seen.authorization]
        assert found[""] == {f"{other.host}/any/app:1"}
        assert found[registry.host] == {f"{registry.host}/team/app:1", f"{other.host}/any/app:1"}
