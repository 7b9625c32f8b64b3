"""Each option of `dadi prefetch`, and each error that an operator may meet, by the command line."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.oci import media_types
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Request, canonical
from dadi.prefetch.when import moment
from superpeer.config import PrefetchConfig
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.network import free_ports
from tests.lab.prefetch_command import dadi, told
from tests.lab.services import PLATFORM, Running, running, tar_of

TARS = [tar_of(**{f"file-{seed}": content(200_000, seed)}) for seed in range(2)]


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


@contextlib.asynccontextmanager
async def one(directory: Path, registry: FakeRegistry, **options: object) -> AsyncIterator[tuple[Running, list[str]]]:
    """Give a superpeer and the options that name it."""
    async with running(directory / "s", registry.host, **{"authorization": "open", **options}) as run:
        yield run, ["--platform", PLATFORM, "--superpeer", run.url]


def only(run: Running) -> Job:
    (job,) = run.superpeer.prefetch.jobs()
    return job


async def test_what_is_asked_for_reaches_the_job(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with one(tmp_path, registry) as (run, whom):
        done = await dadi(
            made.reference, *whom, "--scope", "startup", "--rate", "2Gbit", "--at", "2096-11-10T22:00+08:00",
            "--deadline", "2096-11-10T23:00+08:00", "--priority", "8", "--pin-until", "2096-11-11T02:00+08:00",
            "--nodes", "zone=a,20%", "--node-rate", "100Mbit", "--detach",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert only(run).request == canonical(Request(
            made.reference, PLATFORM, "startup", rate=250e6, at=moment("2096-11-10T14:00Z", 0),
            deadline=moment("2096-11-10T15:00Z", 0), priority=8, pin_until=moment("2096-11-10T18:00Z", 0),
            nodes="zone=a,20%", node_rate=12.5e6,
        ))  # fmt: skip
        assert only(run).state is State.WAITING
        shown = await dadi("status", made.reference, "--scope", "startup", *whom)
        assert shown.exit_code == 0
        assert all(word in shown.output for word in ("rate", "begins", "deadline", "pinned", "zone=a,20%"))


@pytest.mark.parametrize("together", [("--rate", "1Gbit"), ("--deadline", "+2h"), ()])
async def test_images_of_one_command_are_one_batch(
    tmp_path: Path, registry: FakeRegistry, together: tuple[str, ...]
) -> None:
    names = [(await indexed.add(registry, f"team/{name}", TARS[:1], tmp_path)).reference for name in "ab"]
    async with one(tmp_path, registry) as (run, whom):
        assert (await dadi(*names, *whom, *together, "--detach", "--at", "+1h")).exit_code == 0
        (batch,) = {job.request.batch for job in run.superpeer.prefetch.jobs()}
        assert batch.endswith(".2")


async def test_each_platform_that_is_named_is_brought(tmp_path: Path, registry: FakeRegistry) -> None:
    platforms = ["linux/amd64", "linux/arm64", "linux/riscv64"]
    images = [registry.add_image("team/app", None, [tar_of(name=name.encode())], platform=name) for name in platforms]
    document = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": images}
    registry.add_manifest("team/app", "1", document, media_types.OCI_INDEX)
    async with one(tmp_path, registry) as (run, _):
        named = [word for name in platforms[:2] for word in ("--platform", name)]
        about = (f"{registry.host}/team/app:1", "--superpeer", run.url, *named)
        done = await dadi(*about)
        assert done.exit_code == 0, done.output
        assert {job.request.platform for job in run.superpeer.prefetch.jobs()} == set(platforms[:2])
        assert len({job.manifest_digest for job in run.superpeer.prefetch.jobs()}) == 2
        assert (await dadi("verify", *about)).exit_code == 0
        assert (await dadi("verify", *about, "--platform", platforms[2])).exit_code == 1


async def test_the_startup_scope_without_a_trace_says_that_it_is_all_of_the_image(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with one(tmp_path, registry) as (_, whom):
        done = await dadi(made.reference, *whom, "--scope", "startup")
        assert done.exit_code == 0, done.output
        assert ": ready, all of it" in done.output
        assert "no startup trace" in done.output
        proof = await dadi("verify", made.reference, *whom, "--scope", "startup", "--json")
        assert (told(proof)[0]["ready"], told(proof)[0]["proven"]) == (True, "full")
        assert (await dadi("verify", made.reference, *whom)).exit_code == 0


async def test_a_job_is_retried_with_the_image_as_it_is_now(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS[:1], tmp_path)
    async with one(tmp_path, registry) as (run, whom):
        assert (await dadi(made.reference, *whom)).exit_code == 0
        before = only(run).manifest_digest
        registry.add_image("team/app", "1", TARS[1:])
        assert (await dadi("retry", made.reference, *whom)).exit_code == 0
        async with asyncio.timeout(20):
            while not (only(run).state is State.READY and only(run).manifest_digest != before):
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("mode", ["--detach", "--wait"])
async def test_all_jobs_are_submitted_though_none_of_them_ends(
    tmp_path: Path, registry: FakeRegistry, mode: str
) -> None:
    names = [f"{registry.host}/team/app{number}:1" for number in range(100)]
    gate = asyncio.Event()
    registry.script("/manifests/", *[Fault(gate=gate, status=404)] * 1000)
    listed = tmp_path / "images"
    await asyncio.to_thread(listed.write_text, "\n".join(names))
    async with one(tmp_path, registry) as (run, whom):
        command = asyncio.create_task(dadi("--from-file", listed, *whom, mode, "--json"))
        async with asyncio.timeout(50):
            while len(run.superpeer.prefetch.jobs()) < 100:
                await asyncio.sleep(0.05)
        gate.set()
        result = await command
        assert result.exit_code == 1
        assert [row["state"] for row in told(result)] == ["failed"] * 100


# ---- errors that operators meet


async def test_an_unknown_image_is_said_and_the_others_are_brought(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with one(tmp_path, registry) as (_, whom):
        done = await dadi(made.reference, f"{registry.host}/team/none:1", *whom, "--json")
        assert done.exit_code == 1
        known, unknown = told(done)
        assert (known["ready"], known["problems"]) == (True, [])
        assert unknown["ready"] is False
        assert "team/none" in unknown["problems"][0]


async def test_no_room_is_said_before_anything_is_fetched_and_what_would_be_evicted(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    old = await indexed.add(registry, "team/old", TARS[:1], tmp_path)
    big = await indexed.add(registry, "team/big", [tar_of(big=content(900_000, 7))], tmp_path)
    new = await indexed.add(registry, "team/new", TARS[1:], tmp_path)
    async with one(tmp_path, registry, limit=700_000) as (run, whom):
        assert (await dadi(old.reference, *whom)).exit_code == 0
        fetched = run.superpeer.lazy.statistics()["bytes"]
        refused = await dadi(big.reference, *whom)
        assert refused.exit_code == 1
        assert "bytes here; " in refused.output
        assert " are free, and " in refused.output
        assert "were evicted" in refused.output
        assert run.superpeer.lazy.statistics()["bytes"] == fetched
        done = await dadi(new.reference, *whom)
        assert done.exit_code == 0, done.output
        assert "are evicted for it: sha256:" in done.output


async def test_images_that_fit_alone_and_not_together_are_all_refused_before_anything_is_fetched(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    images = {f"team/{seed}": [TARS[0], tar_of(big=content(250_000, seed))] for seed in range(7, 9)}
    names = [(await indexed.add(registry, name, tars, tmp_path)).reference for name, tars in images.items()]
    async with one(tmp_path, registry, limit=1_200_000) as (run, whom):
        for name in names:
            await run.index(name)  # by their indexes it is known what they are unpacked
        refused = await dadi(*names, *whom, "--json")
        assert refused.exit_code == 1
        said = [row["problems"][0] for row in told(refused)]
        assert all("and the 1 that were asked for with it need" in each for each in said), said
        assert {job.state for job in run.superpeer.prefetch.jobs()} == {State.FAILED}
        assert run.superpeer.lazy.statistics()["bytes"] == 0
        assert (await dadi(names[0], *whom)).exit_code == 0, "alone it does"
    # Once it is 1,433,405 bytes, twice 1,838,460; what comes while it is reckoned counts on both sides for a moment.
    async with one(tmp_path / "larger", registry, limit=1_800_000) as (run, whom):
        done = await dadi(*names, *whom)
        errors = [job.error for job in run.superpeer.prefetch.jobs()]
        assert done.exit_code == 0, f"the layer that both have counts once: {errors}"


async def until_one_is_ready(run: Running) -> None:
    async with asyncio.timeout(30):
        while State.READY not in {job.state for job in run.superpeer.prefetch.jobs()}:
            await asyncio.sleep(0.01)


async def test_an_image_that_is_known_late_makes_no_room_where_another_of_its_command_is(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superpeer.jobs_together._PATIENCE", 0.5)
    first = await indexed.add(registry, "team/first", TARS[:1], tmp_path)
    other = await indexed.add(registry, "team/other", [tar_of(big=content(250_000, 7))], tmp_path)
    gate = asyncio.Event()
    registry.script("/team/other/manifests/", *[Fault(gate=gate)] * 5)
    async with one(tmp_path, registry, limit=700_000) as (run, whom):
        command = asyncio.create_task(dadi(first.reference, other.reference, *whom, "--json"))
        await until_one_is_ready(run)
        gate.set()
        done = await command
        assert done.exit_code == 1
        assert [row["ready"] for row in told(done)] == [True, False]
        assert "and the 1 that were asked for with it need" in told(done)[1]["problems"][0]


async def test_an_image_that_had_to_make_room_for_another_is_not_called_ready(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superpeer.jobs_together._PATIENCE", 0.5)
    first = await indexed.add(registry, "team/first", TARS[:1], tmp_path)
    other = await indexed.add(registry, "team/other", [tar_of(big=content(250_000, 7))], tmp_path)
    gate = asyncio.Event()
    registry.script("/team/none/manifests/", *[Fault(gate=gate, status=404)] * 5)
    async with one(tmp_path, registry, limit=700_000) as (run, whom):
        command = asyncio.create_task(dadi(first.reference, f"{registry.host}/team/none:1", *whom, "--json"))
        await until_one_is_ready(run)
        assert (await dadi(other.reference, *whom)).exit_code == 0
        gate.set()
        done = await command
        assert done.exit_code == 1
        assert [row["ready"] for row in told(done)] == [False, False]
        assert "lacks" in told(done)[0]["problems"][0]


async def test_a_deadline_that_cannot_be_met_is_said_at_once_with_the_rate_that_would_do(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    names = [(await indexed.add(registry, f"team/{seed}", TARS[seed:], tmp_path)).reference for seed in range(2)]
    async with one(tmp_path, registry) as (run, whom):
        late = await dadi(names[0], *whom, "--rate", "1kbit", "--deadline", "+60s")
        assert late.exit_code == 1
        assert "there are 59 s until the deadline" in late.output or "there are 60 s until" in late.output
        assert "would do" in late.output
        assert run.superpeer.lazy.statistics()["bytes"] == 0
        # Each alone would come in time, and not both at the one rate: 600 kB in 60 s.
        both = (*names, *whom, "--at", "+1h", "--deadline", "+3660s")
        together = await dadi(*both, "--rate", "60kbit")
        assert together.exit_code == 1
        rates = set(re.findall(r"--rate (\S+) would do", together.output))
        assert len(rates) == 1, "the same, whichever image is looked at"
        assert together.output.count("all images together") == 2
        assert {job.state for job in run.superpeer.prefetch.jobs()} == {State.FAILED}
        assert run.superpeer.lazy.statistics()["bytes"] == 0
        would_do = await dadi(*both, "--rate", rates.pop(), "--detach")
        assert would_do.exit_code == 0, would_do.output
        joined = await dadi(names[0], *whom, "--rate", "1kbit", "--at", "+1h", "--detach")
        assert joined.exit_code == 1, "it waits, and is to go slower than its deadline lets it"
        assert "would do" in joined.output
        assert {job.state for job in run.superpeer.prefetch.jobs()} == {State.WAITING}


async def test_a_datacenter_that_does_not_answer_holds_up_no_other(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    gone = f"http://127.0.0.1:{free_ports(1)[0]}"
    async with one(tmp_path, registry) as (run, _):
        file = tmp_path / "datacenters.toml"
        await asyncio.to_thread(file.write_text, f'[datacenters]\nhere = ["{run.url}"]\nthere = ["{gone}"]\n')
        there = ("--datacenters-file", file, "--datacenter", "here", "--datacenter", "there")
        about = (made.reference, "--platform", PLATFORM, *there)
        done = await dadi(*about)
        assert done.exit_code == 1
        assert "here: ready" in done.output
        assert "there: not ready" in done.output
        assert "cannot connect" in done.output
        assert (await dadi("verify", *about)).exit_code == 1
        listed = await dadi("list", *there)
        assert listed.exit_code == 1
        assert only(run).id in listed.output
        assert "cannot connect" in listed.stderr


async def test_too_many_jobs_are_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    names = [(await indexed.add(registry, f"team/{name}", TARS[:1], tmp_path)).reference for name in "ab"]
    async with one(tmp_path, registry, prefetch=PrefetchConfig(most_jobs=1)) as (_, whom):
        assert (await dadi(names[0], *whom, "--pin-until", "+1h")).exit_code == 0
        refused = await dadi(names[1], *whom)
        assert refused.exit_code == 1
        assert "under way or pinned" in refused.output
