"""A startup trace pushed beside its image in a real registry: another datacenter begins with it, then learns itself."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi import digest as digests
from dadi.cli import trace as verb
from dadi.cli.main import cli
from dadi.errors import InvalidRequest, Malformed
from dadi.index import artifact
from dadi.index.image import ImageIndex
from dadi.node import traces as node_traces
from dadi.oci import media_types
from dadi.oci.config import RegistryConfig
from dadi.oci.manifest import Descriptor, Manifest
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.prefetch import trace, trace_artifact, trace_json
from dadi.prefetch.life import State
from dadi.prefetch.messages import Request, canonical
from dadi.prefetch.trace import Message, Recording, Report, Trace
from superpeer.config import IndexingConfig
from tests.integration.test_traces import Node, node_like, nodes, program, start
from tests.lab import images
from tests.lab.registry import DockerRegistry
from tests.lab.services import CHUNK, PLATFORM, Running, running

pytestmark = pytest.mark.programs("docker-registry", "skopeo")
READS = ((0, range(20)), (1, [5, 3, 4]))
REPOSITORIES = itertools.count()
NOT_USED = "startup trace in the registry not used"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    directory = tmp_path_factory.mktemp("registry")
    image = images.synthetic(directory / "layout", layers=2, files=8, size=1 << 20)
    with DockerRegistry(directory / "docker") as made:
        for number in range(6):
            image.push(f"{made.host}/team{number}/app:1")
        yield made


@pytest.fixture
def reference(storage: DockerRegistry) -> str:
    """An image in a repository of the test's own."""
    return f"{storage.host}/team{next(REPOSITORIES)}/app:1"


@pytest.fixture
async def client(storage: DockerRegistry) -> AsyncIterator[RegistryClient]:
    made = RegistryClient(RegistryConfig(plain_http=(storage.host,), allowed=(storage.host,)))
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def datacenter(directory: Path, reference: str, **options: Any) -> AsyncIterator[tuple[Running, Node]]:
    async with running(directory, reference.partition("/")[0], **options) as run, nodes(run, "one") as (one,):
        run.reference = reference
        yield run, one


async def dadi(monkeypatch: pytest.MonkeyPatch, node: Node, reference: str, *arguments: str) -> str:
    """Run `dadi trace` against a node; it must succeed."""
    like = node_like(node)
    like.startups = node.startups
    answer = await node_traces.show(like, reference, PLATFORM)

    class Client:
        def __init__(self, socket: str) -> None:
            pass

        def call(self, method: str, path: str, parameters: Any = None) -> Any:
            return answer

    monkeypatch.setattr(verb, "NodeClient", Client)
    done = await asyncio.to_thread(CliRunner().invoke, cli, ["trace", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


async def push(client: RegistryClient, reference: str, manifest: str, text: bytes,
               change: Callable[[dict[str, Any]], None] = lambda document: None) -> str:  # fmt: skip
    """Push whatever as a startup trace; return its digest."""
    ref = Reference.parse(reference)
    subject, _ = await client.manifest(ref, manifest)
    held = Descriptor(trace_artifact.MEDIA_TYPE, digests.of(text), len(text))
    for digest, data in ((artifact.EMPTY_CONFIG.digest, artifact.EMPTY), (held.digest, text)):
        await client.push_blob(ref, digest, len(data), data)
    document = json.loads(trace_artifact.encode(Descriptor(subject.media_type, subject.digest, subject.size), held))
    change(document)
    raw = msgspec.json.encode(document)
    return (await client.push_referrer(ref, raw, media_types.OCI_MANIFEST, manifest)).digest


async def known(run: Running, index: ImageIndex) -> bytes:
    return (await run.superpeer.traces.asked(index.manifest_digest)).data


async def test_another_datacenter_begins_with_what_was_pushed_and_learns_for_itself(
    tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with datacenter(tmp_path / "here", reference) as (run, one):
        order = await start(one, run, *READS)
        said = await dadi(monkeypatch, one, reference, "export", reference, "--push", "--plain-http")
        assert "the startup trace is pushed, as sha256:" in said
        assert '"groups"' not in said, "with --push it is not printed"
    async with datacenter(tmp_path / "there", reference) as (run, one), nodes(run, "2", "3", "4") as others:
        await start(one, run, *READS, ahead=True)
        assert one.misses == 0, "the very first start of this datacenter found its chunks"
        assert run.superpeer.traces.statistics()["borrowed"] == 1
        manifest = one.index.manifest_digest
        for node in others:
            await start(node, run, (0, range(2, 20)), (1, [5, 3, 4]))
        (group,) = (found := trace.decode(run.superpeer.traces.given(manifest), Trace)).groups
        assert group.recordings == 4
        assert set(found.chunks(group)) == set(order[2:]), "what three of four starts here did not read is gone"
        await one.keeper.clear(manifest)
        assert await known(run, one.index) == b"", "cleared: it is learnt anew, and not borrowed again"


async def test_the_export_is_in_the_artifact_as_it_is_in_the_file(
    tmp_path: Path, reference: str, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with datacenter(tmp_path / "here", reference) as (run, one):
        await start(one, run, *READS)
        file = tmp_path / "trace.json"
        arguments = ("export", reference, "--push", "--plain-http", "--output", str(file))
        first, second = [await dadi(monkeypatch, one, reference, *arguments) for _ in range(2)]
        assert first == second, "the same trace is the same artifact"
        ref, manifest = Reference.parse(reference), one.index.manifest_digest
        (entry,) = await client.referrers(ref, manifest, trace_artifact.ARTIFACT_TYPE)
        document = (await client.manifest(ref, entry.digest))[1]
        held = Descriptor(**{to: json.loads(document)["layers"][0][of] for to, of in
                             (("media_type", "mediaType"), ("digest", "digest"), ("size", "size"))})  # fmt: skip
        assert await client.blob_bytes(ref, held, trace_artifact.MAX_SIZE) == file.read_bytes()
        assert await client.referrers(ref, manifest, artifact.ARTIFACT_TYPE) == [], "it is taken for no index"


async def test_traces_that_cannot_be_used_are_passed_over_and_said(
    tmp_path: Path, reference: str, client: RegistryClient
) -> None:
    async with datacenter(tmp_path / "here", reference) as (run, one):
        await start(one, run, *READS)
        index = one.index
        good = trace_json.to_json(trace.decode(run.superpeer.traces.given(index.manifest_digest), Trace))
    manifest, (digest, size) = index.manifest_digest, good["blobs"][0]
    usable = await push(client, reference, manifest, msgspec.json.encode(good))
    for value in ({}, [], {**good, "manifest": "sha256:" + "0" * 64}):
        await push(client, reference, manifest, msgspec.json.encode(value))
    await push(client, reference, manifest, b" " * (trace_artifact.MAX_SIZE + 1))
    await push(client, reference, manifest, b"[" * 100_000)
    await push(client, reference, manifest, b"{}", lambda document: document.update(annotations={}))
    assert usable
    async with datacenter(tmp_path / "there", reference) as (run, one):
        index = await run.index(reference)
        assert trace_json.to_json(trace.decode(await known(run, index), Trace)) == good
        assert {row["kind"]: row["count"] for row in run.superpeer.fallbacks.statistics()} == {NOT_USED: 6}
        for wrong in ({"blobs": [[digest, 2 * size], *good["blobs"][1:]]},
                      {"groups": [{"recordings": 1, "steps": [[0, 1 << 20, 1, 0]]}]}):  # fmt: skip
            with pytest.raises(InvalidRequest):
                await run.superpeer.traces.borrow(trace_json.from_json({**good, **wrong}), index)


async def test_with_trusted_keys_only_a_signed_trace_is_used(
    tmp_path: Path, reference: str, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [Ed25519PrivateKey.generate() for _ in range(2)]
    paths = [tmp_path / "ci.pem", tmp_path / "other.pem"]
    for key, path in zip(keys, paths, strict=True):
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                           serialization.NoEncryption()))  # fmt: skip
    public = tmp_path / "ci.pub"
    public.write_bytes(keys[0].public_key().public_bytes(serialization.Encoding.PEM,
                                                         serialization.PublicFormat.SubjectPublicKeyInfo))  # fmt: skip
    trusting = IndexingConfig(chunk_size=CHUNK, trusted_keys=(str(public),))
    export = ("export", reference, "--push", "--plain-http")
    async with datacenter(tmp_path / "here", reference) as (run, one):
        await start(one, run, *READS)
        for number, more in enumerate(((), ("--sign-key", str(paths[1])), ("--sign-key", str(paths[0])))):
            await dadi(monkeypatch, one, reference, *export, *more)
            async with datacenter(tmp_path / f"there{number}", reference, indexing=trusting) as (there, _):
                data = await known(there, await there.index(reference))
                assert bool(data) == (number == 2), more


async def test_what_was_dropped_for_being_wrong_is_not_borrowed_again_and_what_is_away_holds_nobody_up(
    tmp_path: Path, reference: str, client: RegistryClient, storage: DockerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with datacenter(tmp_path / "here", reference) as (run, one):
        await start(one, run, *READS)
        await dadi(monkeypatch, one, reference, "export", reference, "--push", "--plain-http")
        manifest = one.index.manifest_digest
    async with datacenter(tmp_path / "there", reference) as (run, one):
        index = await run.index(reference)
        data = await known(run, index)
        assert data
        for _ in range(2):
            await run.superpeer.traces.learn(Message(manifest, report=Report(trace.name_of(data), 20, 0, 9)), index)
        assert await known(run, index) == b""
        run.superpeer.shipped._not_before.clear()
        assert await known(run, index) == b""
    asked: list[str] = []

    async def hanging(reference: Reference, subject: str) -> None:
        asked.append(subject)
        await asyncio.Event().wait()

    monkeypatch.setattr("superpeer.traces_shipped._PATIENCE", 0.05)
    async with datacenter(tmp_path / "away", reference) as (run, one):
        monkeypatch.setattr(run.superpeer._referrers, "trace", hanging)
        index = await run.index(reference)
        answers = await asyncio.gather(*(known(run, index) for _ in range(20)))
        assert answers == [b""] * 20
        assert asked == [manifest], "once, whoever asks"
        order = program(index, (0, range(3)))
        blob = index.device_blobs()[0]
        steps = tuple((0, chunk, 0) for _, chunk in order)
        message = Message(manifest, Recording("one", ((blob.digest, CHUNK),), steps))
        assert await run.superpeer.traces.learn(message, index)
        assert await known(run, index)


async def test_a_prefetch_job_of_scope_startup_knows_the_shipped_trace(
    tmp_path: Path, reference: str, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with datacenter(tmp_path / "here", reference) as (run, one):
        await start(one, run, *READS)
        await dadi(monkeypatch, one, reference, "export", reference, "--push", "--plain-http")
        manifest = one.index.manifest_digest
    async with datacenter(tmp_path / "there", reference) as (run, _):
        job = await run.superpeer.prefetch.submit(canonical(Request(reference, PLATFORM, scope="startup")))
        async for _row in run.superpeer.prefetch.follow(job.id):
            pass
        assert job.state is State.READY
        assert run.superpeer.traces.has(manifest)
        record = run.superpeer.catalog.record_of(manifest)
        assert record is not None
        assert run.superpeer.traces.startup_chunks(record)


def test_what_an_artifact_must_be() -> None:
    subject = Descriptor(media_types.OCI_MANIFEST, "sha256:" + "1" * 64, 5)
    held = Descriptor(trace_artifact.MEDIA_TYPE, "sha256:" + "2" * 64, 6)
    assert trace_artifact.encode(subject, held) == trace_artifact.encode(subject, held)
    no_subject = Manifest(
        media_types.OCI_MANIFEST, artifact.EMPTY_CONFIG, (held,), annotations={artifact.A_VERSION: "1"},
        artifact_type=trace_artifact.ARTIFACT_TYPE,
    )  # fmt: skip
    with pytest.raises(Malformed):
        trace_artifact.decode(no_subject, subject.digest)

