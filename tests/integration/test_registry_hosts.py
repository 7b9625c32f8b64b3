"""Which hosts the registry client contacts, in which order: what is allowed, and mirrors."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from dadi.errors import (
    NotFound,
    RegistryNotAllowed,
    Unavailable,
)
from dadi.oci.credentials import Credentials
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from tests.fakes.clients import AMD64, DATA, SECRET, MakeClient, blob, hosts_of, ranges, read, ref
from tests.fakes.registry import FakeRegistry, FakeTime, cut, status

# ---- which hosts


@pytest.mark.parametrize("name", ["r.example/a:1", "169.254.169.254/a:1", "localhost:1/a:1", "10.0.0.1/a:1"])
async def test_a_registry_that_is_not_allowed_is_not_contacted(make: MakeClient, name: str) -> None:
    client = make(allowed=("*.internal", "??.0.0.1"))
    reference = Reference.parse(name)
    digest = Descriptor("", "sha256:" + "0" * 64, 1)
    with pytest.raises(RegistryNotAllowed):
        await client.resolve(reference)
    with pytest.raises(RegistryNotAllowed):
        await client.manifest(reference)
    with pytest.raises(RegistryNotAllowed):
        await client.image(reference, AMD64)
    with pytest.raises(RegistryNotAllowed):
        await read(client, reference, digest)
    with pytest.raises(RegistryNotAllowed):
        await client.blob_range(reference, digest, 0, 1)
    assert client.statistics()["requests"] == 0


async def test_a_name_that_leads_to_this_machine_is_refused_unless_it_is_named(
    make: MakeClient, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
        assert host == "innocent.example"
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    port = registry.host.partition(":")[2]
    registry.add_image("team/app", "1", [b"x"])
    reference = Reference.parse(f"innocent.example:{port}/team/app:1")
    with pytest.raises(RegistryNotAllowed, match=r"leads to 127\.0\.0\.1"):
        await make().resolve(reference)
    assert registry.seen == []
    await make(plain_http=(reference.registry,)).resolve(reference)
    assert len(registry.seen) == 1


async def test_a_name_that_does_not_exist_is_unavailable(make: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[Any]:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    with pytest.raises(Unavailable, match=r"the name nowhere\.example cannot be looked up"):
        await make(retries=0).resolve(Reference.parse("nowhere.example/a:1"))


# ---- mirrors


async def test_a_mirror_is_asked_first_and_the_registry_not_at_all(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(mirrors={registry.host: (f"{other.host}/hub",)})
    entry = other.add_image("hub/team/app", "1", [DATA])
    image = await client.image(ref(registry), AMD64)
    assert image.descriptor.digest == entry["digest"]
    assert await read(client, ref(registry), image.manifest.layers[0]) == DATA
    assert registry.seen == []
    assert {seen.query.get("ns") for seen in other.seen} == {registry.host}


async def test_what_a_mirror_does_not_have_comes_from_the_registry(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry, time: FakeTime
) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    entry = registry.add_image("team/app", "1", [b"x"])
    assert (await client.image(ref(registry), AMD64)).descriptor.digest == entry["digest"]
    assert time.slept == []


async def test_a_mirror_that_fails_is_left_alone_for_a_while(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry, time: FakeTime
) -> None:
    client = make(mirrors={registry.host: (other.host,)}, mirror_rest=60.0)
    registry.add_image("team/app", "1", [b"x"])
    other.add_image("team/app", "1", [b"x"])
    other.script("/manifests/", status(500))
    for _ in range(3):
        await client.resolve(ref(registry))
    assert len(other.seen) == 1
    mirror, origin = hosts_of(client)
    assert (mirror["host"], mirror["mirror_of"], mirror["left_alone"]) == (other.host, registry.host, 60.0)
    assert "500" in mirror["last_error"]
    assert (origin["host"], origin["mirror_of"], origin["failures"]) == (registry.host, None, 0)
    time.now += 61
    await client.resolve(ref(registry))
    assert len(other.seen) == 2
    assert len(registry.seen) == 3
    assert time.slept == []


async def test_a_download_that_breaks_at_a_mirror_goes_on_at_the_registry(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    descriptor = blob(registry)
    other.blobs = registry.blobs
    other.script("/blobs/", cut(600_000))
    assert await read(client, ref(registry), descriptor) == DATA
    assert ranges(registry) == ["bytes=600000-999999"]


async def test_a_mirror_that_lies_is_not_believed(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    entry = registry.add_image("team/app", "1", [DATA])
    lie = other.add_image("team/app", None, [b"lie"])
    other.manifests["team/app", entry["digest"]] = other.manifests["team/app", lie["digest"]]
    pinned = ref(registry, f"team/app@{entry['digest']}")
    assert (await client.image(pinned, AMD64)).descriptor.digest == entry["digest"]
    assert hosts_of(client)[0]["left_alone"] == 60.0


async def test_a_reader_can_do_without_mirrors(make: MakeClient, registry: FakeRegistry, other: FakeRegistry) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    descriptor = blob(registry)
    other.blobs[descriptor.digest] = bytes(len(DATA))
    assert await read(client, ref(registry), descriptor) == bytes(len(DATA))
    assert await read(client, ref(registry), descriptor, mirrors=False) == DATA


async def test_resting_mirrors_are_asked_when_the_registry_is_away(make: MakeClient, other: FakeRegistry) -> None:
    async with FakeRegistry() as gone:
        pass
    client = make(plain_http=(gone.host, other.host), mirrors={gone.host: (other.host,)})
    other.add_image("team/app", "1", [b"x"])
    other.script("/manifests/", status(500))
    await client.resolve(ref(gone))
    await client.resolve(ref(gone))
    assert len(other.seen) == 3


async def test_the_error_tells_of_the_mirrors_too(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    other.script("/manifests/", status(500))
    with pytest.raises(NotFound) as failure:
        await client.manifest(ref(registry))
    assert failure.value.hint is not None
    assert f"mirror {other.host}: " in failure.value.hint


async def test_a_mirror_gets_its_own_credentials(make: MakeClient, registry: FakeRegistry) -> None:
    async with FakeRegistry(auth="basic", user="you", password="other") as mirror:
        mine = {mirror.host: Credentials("you", "other"), registry.host: SECRET}
        client = make(mine, plain_http=(registry.host, mirror.host), mirrors={registry.host: (mirror.host,)})
        mirror.add_image("team/app", "1", [b"x"])
        await client.image(ref(registry), AMD64)
        shown = {seen.authorization for seen in mirror.seen}
        assert shown == {None, "Basic " + base64.b64encode(b"you:other").decode()}
