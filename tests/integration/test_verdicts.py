"""What registries are asked about credentials: how often, how many at a time, and what is made of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.errors import AccessDenied, Unavailable
from dadi.oci.credentials import Credentials
from dadi.oci.reference import Reference
from superpeer import verdicts
from tests.fakes.registry import FakeRegistry, status
from tests.lab.access import GOOD, Clock, Node, heads, held, own_credentials, private_registry, value
from tests.lab.services import running, tar_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with private_registry() as fake:
        yield fake


@pytest.fixture
def own(tmp_path: Path, registry: FakeRegistry) -> Path:
    return own_credentials(tmp_path / "config.json", registry)


def guess(number: int) -> str:
    return value(Credentials("me", f"guess {number}"))


async def test_nodes_with_credentials_of_their_own_do_not_ask_the_registry_all_at_once(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    async with running(tmp_path, registry.host, docker_config=own) as run:
        reference, most = Reference.parse(f"{registry.host}/team/app:1"), 0
        asking = run.who_may._verdicts

        async def one(number: int) -> None:
            with pytest.raises(AccessDenied):
                await run.who_may.check(reference, guess(number))

        tasks = [asyncio.create_task(one(number)) for number in range(40)]
        while not all(task.done() for task in tasks):
            slot = asking._slots.get(registry.host)
            most = max(most, verdicts._PARALLEL - slot._value if slot else 0)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert most == verdicts._PARALLEL
        assert run.who_may.statistics()["asked"] == 40
        assert run.who_may.statistics()["asked_first_for_anybody"] == 1


async def test_what_anybody_may_read_costs_one_question_also_where_each_node_has_other_credentials(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as public, running(tmp_path, public.host) as run:
        public.add_image("team/app", "1", [tar_of(a=b"a")])
        reference = Reference.parse(f"{public.host}/team/app:1")
        grants = await asyncio.gather(*(run.who_may.check(reference, guess(number)) for number in range(40)))
        assert len({given.grant for given in grants}) == heads(public) == 1
        assert not [seen for seen in public.seen if seen.authorization]


async def test_refused_strangers_do_not_push_out_who_was_allowed(
    tmp_path: Path, registry: FakeRegistry, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "_MOST_VERDICTS", 10)
    monkeypatch.setattr(verdicts, "_MOST_NOES", 10)
    async with running(tmp_path, registry.host, docker_config=own, authorization_ttl=0) as run:
        reference = Reference.parse(f"{registry.host}/team/app:1")
        await run.who_may.check(reference, value(GOOD))
        for number in range(25):
            with pytest.raises(AccessDenied):
                await run.who_may.check(reference, guess(number))
        registry.script("", *[status(503)] * 50)
        await run.who_may.check(reference, value(GOOD))


async def test_who_guesses_passwords_has_to_wait_and_others_have_not(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock
) -> None:
    async with running(tmp_path, registry.host, docker_config=own, clock=clock) as run:
        reference = Reference.parse(f"{registry.host}/team/app:1")
        for number in range(verdicts._MOST_REFUSALS):
            with pytest.raises(AccessDenied):
                await run.who_may.check(reference, guess(number), "192.0.2.1")
        asked = run.who_may.statistics()["asked"]
        with pytest.raises(Unavailable, match="too many"):
            await run.who_may.check(reference, guess(1000), "192.0.2.1")
        assert run.who_may.statistics()["asked"] == asked
        await run.who_may.check(reference, value(GOOD), "192.0.2.2")
        await run.who_may.check(reference, value(GOOD), "192.0.2.1")  # known by now
        clock.ahead += 61
        with pytest.raises(AccessDenied):
            await run.who_may.check(reference, guess(1001), "192.0.2.1")


@pytest.mark.parametrize("answer", [404, 503])
async def test_renewals_do_not_ask_a_registry_over_and_over_that_cannot_say(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock, answer: int
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential, clock=clock) as run:
        await run.index(f"{registry.host}/team/app:1")
        given = held(run.client)
        registry.script("/manifests/", *[status(answer)] * 99, method="HEAD")
        clock.ahead += 600
        given = await run.client.access.renew(given)
        before = len(registry.seen)
        for _ in range(10):
            given = await run.client.access.renew(given)
        assert len(registry.seen) == before
        clock.ahead += 600
        await run.client.access.renew(given)
        assert len(registry.seen) > before


async def test_a_registry_that_hides_the_image_from_who_lost_access_has_said_no(
    tmp_path: Path, registry: FakeRegistry, own: Path, clock: Clock
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential, clock=clock) as run:
        await run.index(f"{registry.host}/team/app:1")
        given = held(run.client)
        clock.ahead += 600
        # The first two questions are for anybody, and for the node; the third is the superpeer's own.
        registry.script("/manifests/", status(404), status(404), method="HEAD")
        with pytest.raises(AccessDenied):
            await run.client.access.renew(given)
        node.credentials = None  # hiding them is of no use now
        with pytest.raises(AccessDenied):
            await run.client.access.renew(given)
