"""Who may: what the registry is asked, what is remembered, and what holds while it is away. Time is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.errors import AccessDenied, LoginRequired, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.oci.config import RegistryConfig
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.originals import access, away
from dadi.originals.access import Access
from dadi.originals.away import Away
from dadi.originals.caller import ANYBODY, Caller
from dadi.originals.config import OriginalsConfig
from dadi.originals.records import Records
from tests.lab.waiting import until

REF = Reference.parse("reg.example/team/app:1")
ANNE, BOB = Caller("Bearer anne"), Caller("Bearer bob")


class Registry(RegistryClient):
    """A registry that lets in who is in `allowed`; a client of it is known by its caller's key."""

    def __init__(self) -> None:
        super().__init__(RegistryConfig())
        self.allowed: set[str] = set()
        self.away = False
        self.asked: list[str] = []

    async def challenge(self, registry: str, ref: Reference | None = None) -> str | None:
        return 'Bearer realm="https://reg.example/token"'


class Site:
    def __init__(self, directory: Path, **options: float) -> None:
        self.now = 1000.0
        self.registry = Registry()
        self.fallbacks = Fallbacks()
        self.records = Records(directory, most=100, clock=lambda: self.now)
        absent = Away(patience=0.05, clock=lambda: self.now)
        self.config = OriginalsConfig(access_ttl=60.0, stale=3600.0)
        self.access = Access(self.registry, self.config, self.records, absent, self.fallbacks, lambda: self.now)

    async def check(self, caller: Caller) -> None:
        mine = {caller.key: caller, "": ANYBODY}

        async def probe(client: RegistryClient) -> None:
            key = next(key for key in mine if self.access.client(REF.registry, mine[key]) is client)
            self.registry.asked.append(key)
            if self.registry.away:
                raise Unavailable("away")
            if key not in self.registry.allowed:
                raise AccessDenied("no")

        await self.access.check(REF, caller, probe)


@pytest.fixture
async def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "records")
    await site.records.load()
    return site


async def test_what_everybody_may_read_is_asked_once_for_all(site: Site) -> None:
    site.registry.allowed = {""}
    for caller in (ANYBODY, ANNE, BOB, ANNE):
        await site.check(caller)
    assert site.registry.asked == [""]


async def test_a_yes_is_the_callers_alone_and_ends(site: Site) -> None:
    site.registry.allowed = {ANNE.key}
    await site.check(ANNE)
    await site.check(ANNE)
    assert site.registry.asked == ["", ANNE.key]
    with pytest.raises(LoginRequired) as caught:
        await site.check(BOB)
    assert caught.value.challenge.startswith("Bearer realm=")
    site.now += 61
    site.registry.allowed.clear()
    with pytest.raises(LoginRequired):
        await site.check(ANNE)


async def test_a_refusal_is_believed_for_a_moment(site: Site) -> None:
    for _ in range(100):
        with pytest.raises(LoginRequired):
            await site.check(BOB)
    assert site.registry.asked == ["", BOB.key]
    site.registry.allowed = {BOB.key}
    site.now += 6
    await site.check(BOB)


async def test_a_refusal_that_many_are_told_holds_on_to_none_of_them(site: Site) -> None:
    depths = []
    for _ in range(20):
        with pytest.raises(LoginRequired) as caught:
            await site.check(BOB)
        assert caught.value.challenge.startswith("Bearer realm=")
        depths.append(len(caught.traceback))
    assert max(depths[1:]) <= depths[0], "no traceback is of all who were told"
    assert [error.__traceback__ for _, error in site.access._refused.values()] == [None, None]


async def test_refusals_are_forgotten_in_time_and_in_number(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_MOST_REFUSED", 10)
    for number in range(30):
        with pytest.raises(LoginRequired):
            await site.check(Caller(f"Bearer {number}"))
        assert len(site.access._refused) <= 10
    site.now += 100
    with pytest.raises(LoginRequired):
        await site.check(ANYBODY)
    assert [*site.access._refused] == [(REF.name, "")]


async def test_an_old_yes_holds_while_the_registry_is_away_and_a_no_never_becomes_one(site: Site) -> None:
    site.registry.allowed = {ANNE.key}
    await site.check(ANNE)
    site.now += 100
    site.registry.away = True
    await site.check(ANNE)
    assert [row["kind"] for row in site.fallbacks.statistics()] == ["registry away, an earlier permission holds"]
    with pytest.raises(Unavailable):
        await site.check(BOB)
    site.now += 4000
    with pytest.raises(Unavailable):
        await site.check(ANNE)


async def test_what_everybody_may_read_is_known_after_a_restart_and_what_one_may_is_not(
    tmp_path: Path, site: Site
) -> None:
    site.registry.allowed = {""}
    await site.check(ANYBODY)
    again = Site(tmp_path / "records")
    await again.records.load()
    again.access.start()
    again.registry.away = True
    await again.check(ANYBODY)


async def test_many_who_ask_at_once_are_one_question(site: Site) -> None:
    site.registry.allowed = {""}
    await asyncio.gather(*(site.check(ANYBODY) for _ in range(100)))
    assert site.registry.asked == [""]


async def test_that_something_is_missing_is_no_permission(site: Site) -> None:
    async def probe(client: RegistryClient) -> None:
        raise NotFound("no such tag")

    with pytest.raises(NotFound):
        await site.access.check(REF, ANNE, probe)
    with pytest.raises(LoginRequired):
        await site.check(ANNE)


# ---- a registry that hangs


class Hanging(Site):
    """Asks nothing that ends before the test lets it: `gate`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.gate = asyncio.Event()
        self.gate.set()

    async def check(self, caller: Caller) -> None:
        mine = {caller.key: caller, "": ANYBODY}

        async def probe(client: RegistryClient) -> None:
            key = next(key for key in mine if self.access.client(REF.registry, mine[key]) is client)
            self.registry.asked.append(key)
            await self.gate.wait()
            if key not in self.registry.allowed:
                raise AccessDenied("no")

        await self.access.check(REF, caller, probe)


@pytest.fixture
async def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hanging]:
    monkeypatch.setattr(away, "_LONGEST", 0.3)
    monkeypatch.setattr(away, "_LONGEST_AWAY", 0.1)
    site = Hanging(tmp_path / "records")
    await site.records.load()
    yield site
    site.gate.set()
    await site.access.close()


async def test_who_was_accepted_goes_on_without_waiting_for_a_registry_that_hangs(hanging: Hanging) -> None:
    hanging.registry.allowed = {ANNE.key}
    await hanging.check(ANNE)
    hanging.registry.asked.clear()
    hanging.now += 100
    hanging.gate.clear()
    async with asyncio.timeout(5):
        for _ in range(3):
            await hanging.check(ANNE)
    assert hanging.registry.asked == [ANNE.key], "one question for all, and none on behalf of everybody"


async def test_who_was_not_accepted_is_told_in_time_that_the_registry_hangs(hanging: Hanging) -> None:
    hanging.gate.clear()
    async with asyncio.timeout(5):
        for caller in (ANNE, ANNE, BOB):
            with pytest.raises(Unavailable):
                await hanging.check(caller)
    assert hanging.registry.asked == ["", ANNE.key, BOB.key], "what is asked already is not asked again"
    hanging.gate.set()
    hanging.registry.allowed = {ANNE.key}
    async with asyncio.timeout(5):
        while not hanging.access._granted:
            await asyncio.sleep(0.005)
    await hanging.check(ANNE)


async def test_who_was_accepted_is_looked_at_again_though_others_find_the_registry_away(hanging: Hanging) -> None:
    hanging.registry.allowed = {ANNE.key}
    await hanging.check(ANNE)
    hanging.registry.allowed.clear()
    hanging.now += 100
    for _ in range(4):
        hanging.access._away.failed(REF.registry)  # for somebody, again and again
        await hanging.check(ANNE)
        hanging.now += 2
    await until(lambda: not hanging.access._flights._flights)
    with pytest.raises(LoginRequired):
        await hanging.check(ANNE)


async def test_what_everybody_may_read_is_served_while_the_registry_hangs(hanging: Hanging) -> None:
    hanging.registry.allowed = {""}
    await hanging.check(ANYBODY)
    hanging.now += 100
    hanging.gate.clear()
    async with asyncio.timeout(5):
        for caller in (ANNE, BOB, ANYBODY):
            await hanging.check(caller)
    assert hanging.registry.asked == ["", ""]


async def test_clients_with_credentials_are_closed_and_gone_in_the_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[RegistryClient] = []

    async def close(client: RegistryClient) -> None:
        closed.append(client)

    monkeypatch.setattr(Registry, "close", close)
    clients = [site.access.client(REF.registry, Caller(f"Bearer {number}")) for number in range(300)]
    assert len(site.access._clients) == 256
    await site.access.close()
    assert {id(one) for one in closed} == {id(one) for one in clients}
    assert len(site.access._clients) == 0
