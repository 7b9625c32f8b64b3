"""`dadi prefetch` against superpeers: what it prints, and what its exit status means."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.tls import TlsConfig
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.authority import Authority
from tests.fakes.registry import FakeRegistry
from tests.lab.datacenter import datacenter, layers_owned_by_both
from tests.lab.network import free_ports
from tests.lab.prefetch_command import dadi, told
from tests.lab.services import PLATFORM, running, tar_of

TARS = [tar_of(**{f"file-{seed}": content(200_000, seed)}) for seed in range(2)]


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


async def test_a_datacenter_is_warmed_verified_and_its_jobs_are_listed(tmp_path: Path, registry: FakeRegistry) -> None:
    async with datacenter(tmp_path, registry.host, authorization="registry") as dc:
        made = await indexed.add(registry, "team/app", layers_owned_by_both(dc.urls), tmp_path)
        file = tmp_path / "datacenters.toml"
        await asyncio.to_thread(file.write_text, f"[datacenters]\nfra1 = {json.dumps(dc.urls)}\n")
        there = ("--datacenters-file", file, "--datacenter", "fra1")
        about = (made.reference, "--platform", PLATFORM, *there)
        before = await dadi("verify", *about)
        assert before.exit_code == 1
        assert "not ready, registry requests needed to start: 2" in before.output
        done = await dadi(*about, "--priority", "7")
        assert done.exit_code == 0, done.output
        assert f"{made.reference} {PLATFORM} fra1: ready" in done.output
        # Which of its states are seen depends on when it is looked at.
        assert "resolving" in done.stderr or "indexing" in done.stderr or "warming" in done.stderr
        proof = await dadi("verify", *about, "--json")
        assert proof.exit_code == 0
        (row,) = told(proof)
        assert (row["ready"], row["registry_requests"], set(row["superpeers"])) == (True, 0, set(dc.urls))
        listed = await dadi("list", *there, "--json")
        jobs = told(listed)
        assert [(job["state"], job["request"]["priority"]) for job in jobs] == [("ready", 7)] * 2
        for name in (jobs[0]["id"], made.reference):
            shown = await dadi("status", name, "--platform", PLATFORM, *there)
            assert shown.exit_code == 0, shown.output
            assert shown.output.count(": ready") == 2
        tried = await dadi("cancel", jobs[0]["id"], *there)
        assert tried.exit_code == 1
        assert "has no 'cancel'" in tried.stderr


async def test_one_superpeer_of_two_proves_nothing_alone(tmp_path: Path, registry: FakeRegistry) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        made = await indexed.add(registry, "team/app", TARS, tmp_path)
        alone = await dadi(made.reference, "--platform", PLATFORM, "--superpeer", dc.urls[0])
        assert alone.exit_code == 1
        assert f"not asked, and so not proven: {dc.urls[1]}" in alone.output


async def test_a_job_is_cancelled_and_tried_again_by_all_superpeers_and_each_says_what_it_did(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        made = await indexed.add(registry, "team/app", layers_owned_by_both(dc.urls), tmp_path)
        job = (made.reference, "--platform", PLATFORM)
        both = [word for url in dc.urls for word in ("--superpeer", url)]
        first, other = (run.superpeer.prefetch for run in dc.running.values())

        def states() -> list[str]:
            return [job.state.value for each in (first, other) for job in each.jobs()]

        async def until(*wanted: str) -> None:
            async with asyncio.timeout(20):
                while states() != list(wanted):
                    await asyncio.sleep(0.01)

        assert (await dadi(*job, *both[:2], "--at", "+1h", "--detach")).exit_code == 0
        await until("waiting", "waiting")  # the other heard of it from the first
        assert f"shared    by {', '.join(sorted(dc.urls))}" in (await dadi("status", *job, *both)).output
        alone = await dadi("cancel", *job, *both[:2])
        assert alone.exit_code == 1
        assert f"{dc.urls[1]}: it was not asked: there the job goes on" in alone.stderr
        assert states() == ["cancelled", "waiting"]
        rest = await dadi("cancel", *job, *both, "--json")
        assert rest.exit_code == 0, "it is over everywhere: one had ended before"
        assert [(row["superpeer"], row["state"]) for row in told(rest)] == [(url, "cancelled") for url in dc.urls]
        nothing = await dadi("cancel", *job, *both)
        assert nothing.exit_code == 1
        assert nothing.stderr.count("has no 'cancel'") == 2

        await first.retry(first.jobs()[0].id)
        await until("waiting", "waiting")  # the first has told the other
        await other.cancel(other.jobs()[0].id)
        again = await dadi("retry", *job, *both)
        assert again.exit_code == 0, "it is under way everywhere: one had not ended"
        await until("waiting", "waiting")
        under_way = await dadi("retry", *job, *both)
        assert under_way.exit_code == 1
        gone = f"http://127.0.0.1:{free_ports(1)[0]}"
        away = await dadi("cancel", *job, *both, "--superpeer", gone, "--json")
        assert away.exit_code == 1
        assert [row.get("state", row.get("error")) for row in told(away)] == ["cancelled", "cancelled", "unreachable"]

        await first.retry(first.jobs()[0].id)
        await until("waiting", "waiting")
        name = first.jobs()[0].id
        shown, other.find = other.find, lambda job: first.find("-" + job)  # as if it hid what we may not see
        hidden = await dadi("cancel", name, *both)
        other.find = shown
        assert hidden.exit_code == 1, "there it goes on"
        assert f"{dc.urls[1]}: it shares the job, and does not show it by its id" in hidden.stderr
        assert states() == ["cancelled", "waiting"]


async def test_who_has_no_such_job_is_said_and_fails_nothing(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS[:1], tmp_path)
    async with (
        running(tmp_path / "s", registry.host, authorization="open") as run,
        running(tmp_path / "other", registry.host, authorization="open") as other,
    ):
        job = (made.reference, "--platform", PLATFORM, "--superpeer", run.url)
        assert (await dadi(*job, "--at", "+1h", "--detach")).exit_code == 0
        cancelled = await dadi("cancel", *job, "--superpeer", other.url)
        assert cancelled.exit_code == 0, cancelled.output
        assert f"at {other.url}: no such job" in cancelled.output


async def test_a_superpeer_that_is_away_is_said_and_the_others_go_on(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    gone = f"http://127.0.0.1:{free_ports(1)[0]}"
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        file = tmp_path / "datacenters.toml"
        text = f'[datacenters]\nhere = ["{run.url}"]\nthere = ["{gone}"]\n'
        await asyncio.to_thread(file.write_text, text)
        result = await dadi(made.reference, "--platform", PLATFORM, "--datacenters-file", file, "--all", "--json")
        assert result.exit_code == 1
        rows = {row["datacenter"]: row for row in told(result)}
        assert (rows["here"]["ready"], rows["here"]["problems"]) == (True, [])
        assert (rows["there"]["ready"], rows["there"]["state"]) == (False, "away")
        assert "cannot connect" in rows["there"]["problems"][0]


async def test_images_come_from_lists_and_manifests_and_a_refused_job_is_said_though_detached(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    a = await indexed.add(registry, "team/a", TARS[:1], tmp_path)
    b = await indexed.add(registry, "team/b", TARS[1:], tmp_path)
    listed = tmp_path / "images.txt"
    await asyncio.to_thread(listed.write_text, f"# ours\n{a.reference}  # first\n\n")
    pod = f"kind: Pod\nspec: {{containers: [{{image: '{b.reference}'}}]}}\n"
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        whom = ("--platform", PLATFORM, "--superpeer", run.url)
        result = await dadi("--from-file", listed, "-f", "-", *whom, stdin=pod)
        assert result.exit_code == 0, result.output
        ready = [line for line in result.stdout.splitlines() if ": ready, " in line]
        assert [line.split()[0] for line in ready] == [a.reference, b.reference]
        late = await dadi(a.reference, f"{registry.host}/team/none:1", *whom, "--detach", "--rate", "1kbit",
                          "--deadline", "+1s", "--at", "+1m")  # fmt: skip
        assert late.exit_code == 1
        assert "over before it begins" in late.output
        assert "team/none" in late.output
        detached = await dadi(b.reference, *whom, "--detach", "--at", "+1h")
        assert detached.exit_code == 0, detached.output
        assert "is waiting" in detached.output
        cancelled = await dadi("cancel", b.reference, *whom)
        assert cancelled.exit_code == 0
        assert "cancelled" in cancelled.output
        unknown = await dadi("status", "0123456789ab", "--superpeer", run.url)
        assert unknown.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nginx",), "no superpeer is named"),
        (("--superpeer", "http://127.0.0.1:1"), "no image is named"),
        (("nginx", "--superpeer", "127.0.0.1:1"), "not the URL of a superpeer"),
        (("nginx", "--datacenter", "x", "--datacenters-file", "/nonexistent"), "there is no /nonexistent"),
        (("nginx", "--superpeer", "http://127.0.0.1:1", "--at", "soon"), "is no time"),
        (("nginx", "--superpeer", "http://127.0.0.1:1", "--rate", "fast"), "is not a number"),
        (("-f", "/nonexistent", "--superpeer", "http://127.0.0.1:1"), "cannot be read"),
    ],
)
async def test_what_cannot_be_meant_is_said(arguments: tuple[str, ...], said: str) -> None:
    result = await dadi(*arguments)
    assert result.exit_code == 1
    assert said in str(result.exception)


async def test_help_names_the_verbs() -> None:
    result = await dadi("--help")
    assert result.exit_code == 0
    assert all(verb in result.output for verb in ("start", "status", "list", "cancel", "retry", "verify"))


async def test_superpeers_that_speak_tls_are_asked_with_the_certificates_of_the_file(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    authority = await asyncio.to_thread(Authority, tmp_path / "tls")
    certificate, key = await asyncio.to_thread(authority.issue, "superpeer")
    tls = TlsConfig(certificate=certificate, key=key, ca=authority.file, client_ca=authority.file)
    mine, my_key = await asyncio.to_thread(authority.issue, "operator")
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with running(tmp_path / "s", registry.host, tls=tls, authorization="open") as run:
        file = tmp_path / "datacenters.toml"
        section = f'[tls]\ncertificate = "{mine}"\nkey = "{my_key}"\nca = "{authority.file}"\n'
        await asyncio.to_thread(file.write_text, f'[datacenters]\nfra1 = ["{run.url}"]\n{section}')
        about = (made.reference, "--platform", PLATFORM, "--datacenters-file", file, "--all")
        done = await dadi(*about)
        assert done.exit_code == 0, done.output
        await asyncio.to_thread(file.write_text, f'[datacenters]\nfra1 = ["{run.url}"]\n')
        assert (await dadi("verify", *about)).exit_code == 1


async def test_a_private_image_needs_credentials_which_are_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "correct-horse-battery"
    async with FakeRegistry(auth="basic", user="u", password=secret) as private:
        private.add_image("team/app", "1", TARS)
        encoded = base64.b64encode(f"u:{secret}".encode()).decode()
        docker = tmp_path / "docker" / "config.json"
        await asyncio.to_thread(docker.parent.mkdir)
        await asyncio.to_thread(docker.write_text, json.dumps({"auths": {private.host: {"auth": encoded}}}))
        image = f"{private.host}/team/app:1"
        async with running(tmp_path / "s", private.host, authorization="registry", docker_config=docker) as run:
            whom = ("--platform", PLATFORM, "--superpeer", run.url)
            monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "nothing"))
            refused = await dadi(image, *whom)
            assert refused.exit_code == 1
            assert run.superpeer.prefetch.jobs() == []
            monkeypatch.setenv("DOCKER_CONFIG", str(docker.parent))
            done = await dadi(image, *whom)
            assert done.exit_code == 0, done.output
            assert (await dadi("status", image, *whom)).exit_code == 0
            (job,) = run.superpeer.prefetch.jobs()
            hidden = await dadi("status", job.id, *whom)
            assert hidden.exit_code == 1
            assert "name the image instead of the job" in str(hidden.exception)
            assert "no jobs" in (await dadi("list", *whom[2:])).output
        found = await asyncio.to_thread(_grep, tmp_path / "s", [secret.encode(), encoded.encode()])
        assert found == []
        assert secret not in done.output
        assert encoded not in done.output


def _grep(directory: Path, words: list[bytes]) -> list[Path]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path for path in files if any(word in path.read_bytes() for word in words)]
