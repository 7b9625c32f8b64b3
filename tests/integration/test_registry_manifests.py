"""Manifests pushed, referrers and indexes under a tag, at a registry that misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from dadi import digest as digests
from dadi.errors import (
    AccessDenied,
    Conflict,
    DadiError,
    InvalidRequest,
    Malformed,
    NotFound,
    TooLarge,
    Unsupported,
)
from dadi.oci import media_types as types
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import FixedCredentials
from dadi.oci.manifest import Descriptor
from dadi.oci.referrers import fallback_tag
from dadi.oci.registry import RegistryClient
from tests.fakes.clients import KIND, artifact, ref
from tests.fakes.registry import FakeRegistry, FakeTime, Fault, status

DIGEST = digests.of(b"a blob")


# ---- manifests


SUBJECT = Descriptor(types.OCI_MANIFEST, digests.of(b"subject"), 7)


@pytest.fixture
def ready(registry: FakeRegistry) -> FakeRegistry:
    """A registry that has the empty config."""
    registry.add_blob(b"{}")
    return registry


async def test_a_manifest_is_pushed_by_tag_or_by_digest(client: RegistryClient, ready: FakeRegistry) -> None:
    raw = artifact()
    pushed = await client.push_manifest(ref(ready), raw, types.OCI_MANIFEST)
    assert (pushed.digest, pushed.subject_known) == (digests.of(raw), False)
    assert ready.manifests["team/app", "1"] == (types.OCI_MANIFEST, raw)
    await client.push_manifest(ref(ready, "team/b").at(pushed.digest), raw, types.OCI_MANIFEST)
    assert ("team/b", "latest") not in ready.manifests
    assert await client.manifest(ref(ready, "team/b").at(pushed.digest)) == (await client.manifest(ref(ready)))


async def test_a_manifest_of_another_digest_than_the_reference_names_is_not_pushed(
    client: RegistryClient, ready: FakeRegistry
) -> None:
    with pytest.raises(InvalidRequest, match="has digest"):
        await client.push_manifest(ref(ready).at(DIGEST), artifact(), types.OCI_MANIFEST)
    with pytest.raises(TooLarge):
        await client.push_manifest(ref(ready), bytes(5 << 20), types.OCI_MANIFEST)
    assert ready.seen == []


async def test_a_manifest_whose_blobs_are_not_there_is_refused(client: RegistryClient, registry: FakeRegistry) -> None:
    with pytest.raises(NotFound, match="MANIFEST_BLOB_UNKNOWN"):
        await client.push_manifest(ref(registry), artifact(), types.OCI_MANIFEST)


@pytest.mark.parametrize(
    "fault", [status(503), status(429, Retry_After="3"), Fault(drop=True), Fault(lost=True)], ids=str
)
async def test_a_manifest_is_pushed_again_if_that_failed(
    client: RegistryClient, ready: FakeRegistry, fault: Fault
) -> None:
    ready.script("/manifests/", fault, method="PUT")
    raw = artifact()
    assert (await client.push_manifest(ref(ready), raw, types.OCI_MANIFEST)).digest == digests.of(raw)
    assert ready.manifests["team/app", "1"] == (types.OCI_MANIFEST, raw)


@pytest.mark.parametrize("code", [400, 409, 412])
async def test_a_tag_that_must_not_change_is_a_conflict_unless_it_is_right_already(
    client: RegistryClient, ready: FakeRegistry, code: int
) -> None:
    ready.immutable_tags = code
    raw = artifact()
    await client.push_manifest(ref(ready), raw, types.OCI_MANIFEST)
    assert (await client.push_manifest(ref(ready), raw, types.OCI_MANIFEST)).digest == digests.of(raw)
    with pytest.raises(Conflict, match=r"immutable.*--output DIR"):
        await client.push_manifest(ref(ready), artifact(a="b"), types.OCI_MANIFEST)
    assert ready.manifests["team/app", "1"][1] == raw


# ---- referrers


@pytest.mark.parametrize("api", [True, False])
async def test_what_is_pushed_with_a_subject_is_listed_as_its_referrer(
    client: RegistryClient, ready: FakeRegistry, api: bool
) -> None:
    ready.referrers_api = api
    assert await client.referrers(ref(ready), SUBJECT.digest) == []
    one = await client.push_referrer(ref(ready), artifact(SUBJECT, a="1"), types.OCI_MANIFEST, SUBJECT.digest)
    two = await client.push_referrer(ref(ready), artifact(SUBJECT, "x/y"), types.OCI_MANIFEST, SUBJECT.digest)
    assert (one.digest, one.artifact_type, one.annotations) == (digests.of(artifact(SUBJECT, a="1")), KIND, {"a": "1"})
    assert await client.referrers(ref(ready), SUBJECT.digest) == [one, two]
    assert await client.referrers(ref(ready), SUBJECT.digest, KIND) == [one]
    assert await client.referrers(ref(ready), SUBJECT.digest, "no/thing") == []
    assert await client.referrers(ref(ready), digests.of(b"else")) == []
    tag = fallback_tag(SUBJECT.digest)
    assert (("team/app", tag) in ready.manifests) == (not api)
    if not api:
        media_type, raw = ready.manifests["team/app", tag]
        assert media_type == types.OCI_INDEX
        assert json.loads(raw)["manifests"][0] == {
            "mediaType": types.OCI_MANIFEST,
            "digest": one.digest,
            "size": one.size,
            "artifactType": KIND,
            "annotations": {"a": "1"},
        }


async def test_a_referrer_that_is_pushed_again_is_listed_once(client: RegistryClient, ready: FakeRegistry) -> None:
    for _ in range(2):
        await client.push_referrer(ref(ready), artifact(SUBJECT), types.OCI_MANIFEST, SUBJECT.digest)
    assert len(await client.referrers(ref(ready), SUBJECT.digest)) == 1


async def test_an_artifact_without_a_type_is_what_its_config_is(client: RegistryClient, ready: FakeRegistry) -> None:
    await client.push_referrer(ref(ready), artifact(SUBJECT, kind=""), types.OCI_MANIFEST, SUBJECT.digest)
    assert [entry.artifact_type for entry in await client.referrers(ref(ready), SUBJECT.digest)] == [types.OCI_EMPTY]


async def test_a_referrer_of_something_else_is_not_pushed(client: RegistryClient, ready: FakeRegistry) -> None:
    for raw in (artifact(), artifact(SUBJECT)):
        with pytest.raises(InvalidRequest, match="subject"):
            await client.push_referrer(ref(ready), raw, types.OCI_MANIFEST, DIGEST)
    assert ready.seen == []


def listing(*entries: dict[str, Any], **headers: str) -> Fault:
    index = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": list(entries)}
    return Fault(status=200, body=json.dumps(index).encode(), headers={"Content-Type": types.OCI_INDEX, **headers})


def listed(number: int, kind: str = KIND) -> dict[str, Any]:
    digest = digests.of(str(number).encode())
    return {"mediaType": types.OCI_MANIFEST, "digest": digest, "size": number, "artifactType": kind}


@pytest.mark.parametrize(
    "fault",
    [status(404), status(400), status(405), status(406), status(501),
     Fault(status=200, body=b"<html>", headers={"Content-Type": "text/html"})],
    ids=str,
)  # fmt: skip
async def test_without_the_referrers_api_the_fallback_tag_is_read(
    client: RegistryClient, registry: FakeRegistry, fault: Fault
) -> None:
    index = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": [listed(1), listed(2, "x/y")]}
    registry.add_manifest("team/app", fallback_tag(SUBJECT.digest), index, types.OCI_INDEX)
    registry.script("/referrers/", fault)
    found = await client.referrers(ref(registry), SUBJECT.digest, KIND)
    assert [entry.size for entry in found] == [1]
    assert registry.asked("/referrers/")[0].query == {"artifactType": KIND}


async def test_pages_are_read_to_the_end_and_filtered_by_us_too(client: RegistryClient, ready: FakeRegistry) -> None:
    ready.referrers_api, ready.page_size = True, 2
    for number in range(5):
        kind = KIND if number % 2 else "x/y"
        raw = artifact(SUBJECT, kind, n=str(number))
        ready.add_manifest("team/app", None, raw, types.OCI_MANIFEST)
    assert len(await client.referrers(ref(ready), SUBJECT.digest)) == 5
    assert len(ready.asked("/referrers/")) == 3
    # The next pages come without the filter here.
    assert {entry.artifact_type for entry in await client.referrers(ref(ready), SUBJECT.digest, KIND)} == {KIND}


@pytest.mark.parametrize("status_", [503, 429])
async def test_a_listing_is_asked_for_again(client: RegistryClient, registry: FakeRegistry, status_: int) -> None:
    registry.script("/referrers/", status(status_, Retry_After="1"), listing(listed(1)))
    assert len(await client.referrers(ref(registry), SUBJECT.digest)) == 1


async def test_entries_that_make_no_sense_are_left_out(client: RegistryClient, registry: FakeRegistry) -> None:
    odd = {**listed(2), "digest": "sha512:" + "0" * 128}
    registry.script("/referrers/", listing(odd, {"a": 1}, listed(1), {**listed(3), "size": -1}))
    assert [entry.size for entry in await client.referrers(ref(registry), SUBJECT.digest)] == [1]


def _next(url: str) -> str:
    return f'<{url}>; rel="next"'


@pytest.mark.parametrize(
    ("faults", "error", "said"),
    [
        ([listing(*[listed(n) for n in range(1001)])], TooLarge, "delete"),
        ([listing(*[listed(n) for n in range(600)], Link=_next("?p=1")), listing(*[listed(n) for n in range(600)])],
         TooLarge, "more than 1000"),
        ([listing(Link=_next(f"?p={n}")) for n in range(50)], TooLarge, "50 pages"),
        ([listing(Link=_next("?p=1")), listing(Link=_next("?p=1"))], Malformed, "came before"),
        ([listing(Link=_next("https://evil.example/"))], Malformed, "another host"),
        ([listing(Link=_next("http://127.0.0.1:1/"))], Malformed, "another host"),
        ([listing(Link=_next("?p=1")), status(404)], Malformed, "next page"),
        ([listing({"x": "y" * (5 << 20)})], TooLarge, "delete"),
        ([listing({"x": "y" * (3 << 20)}, Link=_next("?p=1")), listing({"x": "y" * (3 << 20)})], TooLarge, "delete"),
        ([Fault(status=200, body=b"{", headers={"Content-Type": types.OCI_INDEX})], Malformed, "index"),
        ([status(403)], AccessDenied, "docker login"),
    ],
)  # fmt: skip
async def test_a_hostile_listing_is_an_error_soon(
    client: RegistryClient, registry: FakeRegistry, faults: list[Fault], error: type[DadiError], said: str
) -> None:
    registry.script("/referrers/", *faults)
    with pytest.raises(error, match=said) as caught:
        await client.referrers(ref(registry), SUBJECT.digest)
    assert "--output" not in str(caught.value)
    assert len(registry.asked("/referrers/")) == len(faults)


# ---- indexes under a tag


def adding(number: int) -> Callable[[list[Descriptor]], list[Descriptor]]:
    new = Descriptor("x/y", digests.of(str(number).encode()), number)
    return lambda entries: entries if new in entries else [*entries, new]


def dropping(number: int) -> Callable[[list[Descriptor]], list[Descriptor]]:
    return lambda entries: [entry for entry in entries if entry.size != number]


async def sizes(client: RegistryClient, registry: FakeRegistry, tag: str = "list") -> list[int]:
    return sorted(entry.size for entry in await client.tagged_index(ref(registry), tag))


async def test_an_index_under_a_tag_is_made_and_changed(client: RegistryClient, registry: FakeRegistry) -> None:
    assert await sizes(client, registry) == []
    await client.update_index(ref(registry), "list", adding(1))
    await client.update_index(ref(registry), "list", adding(2))
    await client.update_index(ref(registry), "list", dropping(1))
    assert await sizes(client, registry) == [2]
    pushes = len(registry.pushed)
    await client.update_index(ref(registry), "list", adding(2))
    assert len(registry.pushed) == pushes
    # The reference's own tag and digest have nothing to do with it.
    assert await sizes(client, registry, "1") == []


@pytest.mark.parametrize("etags", [False, True])
async def test_ten_at_once_in_one_process_lose_nothing(
    client: RegistryClient, registry: FakeRegistry, etags: bool
) -> None:
    registry.etags = etags
    await asyncio.gather(*(client.update_index(ref(registry), "list", adding(n)) for n in range(10)))
    assert await sizes(client, registry) == list(range(10))
    assert len(registry.pushed) == 10


async def test_where_the_registry_compares_nothing_of_others_is_overwritten(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    registry.etags = True
    await client.update_index(ref(registry), "list", adding(0))
    theirs = json.loads(registry.manifests["team/app", "list"][1])
    theirs["manifests"].append({"mediaType": "x/y", "digest": digests.of(b"theirs"), "size": 100, "data": "AA=="})
    seen = []

    def change(entries: list[Descriptor]) -> list[Descriptor]:
        if not seen:  # between our reading and our writing
            registry.add_manifest("team/app", "list", theirs, types.OCI_INDEX)
        seen.append([entry.size for entry in entries])
        return adding(1)(entries)

    await client.update_index(ref(registry), "list", change)
    assert seen == [[0], [0, 100], [0, 100, 1]]
    assert await sizes(client, registry) == [0, 1, 100]
    assert b'"AA=="' in registry.manifests["team/app", "list"][1]


async def test_who_is_overwritten_writes_again(client: RegistryClient, registry: FakeRegistry, time: FakeTime) -> None:
    """Two clients read the same; ours writes first, theirs last: ours notices when it looks again."""
    theirs = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": [listed(5)]}
    sleep, overwritten = time.sleep, 0

    async def sleep_while_others_write(seconds: float) -> None:
        nonlocal overwritten
        if overwritten < 3:
            overwritten += 1
            registry.add_manifest("team/app", "list", theirs, types.OCI_INDEX)
        await sleep(seconds)

    time.sleep = sleep_while_others_write
    racer = RegistryClient(
        RegistryConfig(plain_http=(registry.host,)), credentials=FixedCredentials(), clock=time.clock()
    )
    await racer.update_index(ref(registry), "list", adding(1))
    assert await sizes(racer, registry) == [1, 5]
    assert overwritten == 3
    await racer.close()


async def test_a_change_that_never_stays_is_a_conflict(client: RegistryClient, registry: FakeRegistry) -> None:
    count = 0

    def never_content(entries: list[Descriptor]) -> list[Descriptor]:
        nonlocal count
        count += 1
        return adding(count)(entries)

    with pytest.raises(Conflict, match="attempts"):
        await client.update_index(ref(registry), "list", never_content)
    assert count == len(registry.pushed)


async def test_a_failed_write_is_not_sent_again_without_reading_first(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    registry.script("/manifests/list", status(503), Fault(drop=True), method="PUT")
    await client.update_index(ref(registry), "list", adding(1))
    assert [seen.method for seen in registry.asked("/manifests/list")] == ["GET", "PUT"] * 3 + ["GET"]


async def test_what_is_no_index_is_not_overwritten(client: RegistryClient, ready: FakeRegistry) -> None:
    ready.add_manifest("team/app", "list", artifact(), types.OCI_MANIFEST)
    with pytest.raises(Unsupported, match=r"team/app:list.*not an index"):
        await client.update_index(ref(ready), "list", adding(1))
    with pytest.raises(Unsupported):
        await client.tagged_index(ref(ready), "list")
    assert ready.pushed == []


async def test_an_index_that_would_have_too_many_entries_is_not_written(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    full = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": [listed(n) for n in range(1000)]}
    registry.add_manifest("team/app", "list", full, types.OCI_INDEX)
    with pytest.raises(TooLarge, match=r"1001 entries.*delete"):
        await client.update_index(ref(registry), "list", adding(1))
    registry.script("/manifests/list", Fault(status=200, body=bytes(5 << 20)))
    with pytest.raises(TooLarge, match="delete"):
        await client.tagged_index(ref(registry), "list")
    assert registry.pushed == []


async def test_a_fallback_tag_that_must_not_change_says_what_to_do(client: RegistryClient, ready: FakeRegistry) -> None:
    await client.push_referrer(ref(ready), artifact(SUBJECT), types.OCI_MANIFEST, SUBJECT.digest)
    ready.immutable_tags = 409
    with pytest.raises(Conflict, match=rf"{fallback_tag(SUBJECT.digest)}.*--output DIR"):
        await client.push_referrer(ref(ready), artifact(SUBJECT, a="b"), types.OCI_MANIFEST, SUBJECT.digest)


async def test_locks_of_tags_are_forgotten(client: RegistryClient, registry: FakeRegistry) -> None:
    for number in range(3):
        await client.update_index(ref(registry), f"list-{number}", adding(1))
    assert len(client._tagged._locks) == 0
