"""Private images before the peak: with credentials that come with the job, by operators, told to nobody else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from dadi import http
from dadi.errors import AccessDenied
from dadi.oci.credentials import Credentials
from dadi.oci.reference import Reference
from dadi.peers import shown
from dadi.prefetch.life import State
from dadi.prefetch.messages import Request, Wishes, canonical, decode_wishes, job_id
from superpeer.config import PrefetchConfig
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault
from tests.integration.test_prefetch_nodes import TARS, node
from tests.lab.datacenter import datacenter, layers_owned_by_both
from tests.lab.network import free_ports
from tests.lab.prefetch_command import dadi, told
from tests.lab.services import PLATFORM, Running, running, tar_of

USER, SECRET = "somebody", "correct-horse-battery"
ENCODED = base64.b64encode(f"{USER}:{SECRET}".encode()).decode()
LOGIN = ("--username", USER, "--password-stdin")
TOKEN = "an-operator's-token-of-some-length"


@pytest.fixture
async def private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[FakeRegistry]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "nothing"))
    async with FakeRegistry(auth="basic", user=USER, password=SECRET) as fake:
        fake.add_image("team/app", "1", TARS)
        yield fake


def image(private: FakeRegistry) -> str:
    return f"{private.host}/team/app:1"


def written(directory: Path, *words: str) -> list[Path]:
    """Return the files below a directory that hold one of the words."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path for path in files if any(word.encode() in path.read_bytes() for word in words)]


@pytest.mark.parametrize("authorization", ["registry", "open"])
async def test_the_superpeer_fetches_with_the_credentials_of_the_job_and_keeps_none(
    tmp_path: Path, private: FakeRegistry, authorization: str, capfd: pytest.CaptureFixture[str]
) -> None:
    private.add_image("team/app", "2", [tar_of(other=content(1000, 9))])
    async with running(tmp_path / "s", private.host, authorization=authorization) as run:
        whom = ("--platform", PLATFORM, "--superpeer", run.url)
        refused = await dadi(image(private), *whom)
        assert refused.exit_code == 1
        wrong = await dadi(image(private), *whom, "--username", USER, "--password-stdin", stdin="wrong-horse\n")
        assert wrong.exit_code == 1
        done = await dadi(image(private), *whom, *LOGIN, stdin=f"{SECRET}\n")
        assert done.exit_code == 0, done.output
        assert (await dadi("verify", image(private), *whom, *LOGIN, stdin=SECRET)).exit_code == 0
        assert repr(run.superpeer.job_secrets) == "JobSecrets(0 jobs)"
        with pytest.raises(AccessDenied):  # of its own it has none
            await run.superpeer.registry.resolve(Reference.parse(f"{private.host}/team/app:2"))
        output = capfd.readouterr()
    said = f"{output.out}{output.err}{done.output}{done.stderr}{refused.output}{wrong.output}"
    assert SECRET not in said
    assert ENCODED not in said
    assert "wrong-horse" not in said
    assert await asyncio.to_thread(written, tmp_path / "s", SECRET, ENCODED, "wrong-horse") == []


async def until(job: str, run: Running, *states: State) -> None:
    async with asyncio.timeout(20):
        while not any(each.id == job and each.state in states for each in run.superpeer.prefetch.jobs()):
            await asyncio.sleep(0.01)


async def test_after_a_restart_the_command_that_waits_gives_them_again_and_without_one_the_job_says_so(
    tmp_path: Path, private: FakeRegistry
) -> None:
    gate, (port,) = asyncio.Event(), free_ports(1)
    private.script("/blobs/", *[Fault(gate=gate)] * 100, method="GET")
    job = job_id(canonical(Request(image(private), PLATFORM)))
    options: dict[str, Any] = {"authorization": "registry", "port": port}
    async with contextlib.AsyncExitStack() as stack:
        run = await stack.enter_async_context(running(tmp_path / "s", private.host, **options))
        about = (image(private), "--platform", PLATFORM, "--superpeer", run.url)
        command = asyncio.create_task(dadi(*about, *LOGIN, stdin=SECRET))
        await until(job, run, State.RESOLVING, State.INDEXING)
        await stack.aclose()
        gate.set()
        run = await stack.enter_async_context(running(tmp_path / "s", private.host, **options))
        done = await command
        assert done.exit_code == 0, done.output
        (kept,) = run.superpeer.prefetch.jobs()
        assert (kept.state, kept.private) == (State.READY, True)

        gate.clear()
        private.script("/blobs/", *[Fault(gate=gate)] * 100, method="GET")
        private.add_image("team/app", "1", [tar_of(new=content(1000, 5))])
        await run.superpeer.prefetch.submit(canonical(Request(image(private), PLATFORM)), Credentials(USER, SECRET))
        await until(job, run, State.RESOLVING, State.INDEXING)
        await stack.aclose()
        gate.set()
        run = await stack.enter_async_context(running(tmp_path / "s", private.host, **options))
        await until(job, run, State.FAILED)
        shown = await dadi("status", *about, *LOGIN, stdin=SECRET)
        assert f"credentials needed for {private.host}/team/app" in shown.output
        assert "submit it again" in shown.output
        again = await dadi("retry", *about, *LOGIN, stdin=SECRET)
        assert again.exit_code == 0, again.output
        await until(job, run, State.READY)


async def test_whom_the_registry_does_not_let_in_is_told_of_a_job_what_he_is_told_of_one_that_there_is_not(
    tmp_path: Path, private: FakeRegistry
) -> None:
    """Ids can be guessed by who knows an image's name."""
    full = canonical(Request(image(private), PLATFORM))
    there, not_there = job_id(full), job_id(msgspec.structs.replace(full, scope="startup"))
    wrong, right = (shown.header(Credentials(USER, password)) for password in ("wrong-horse", SECRET))
    async with (
        running(tmp_path / "s", private.host, authorization="registry") as run,
        aiohttp.ClientSession() as session,
    ):

        async def answers(headers: dict[str, str], **parameters: str) -> list[tuple[int, str]]:
            """Return what is answered to each kind of question, of the job that is there and of the other."""
            told = []
            for verb, what in (("GET", ""), ("POST", "/cancel"), ("POST", "/retry"), ("POST", "/nodes")):
                for job in (there, not_there):
                    url = f"{run.url}/v1/prefetch/{job}{what}"
                    body = b'{"node": "n", "state": "ready"}' if what == "/nodes" else None
                    async with session.request(verb, url, headers=headers, params=parameters, data=body) as answer:
                        told.append((answer.status, (await answer.text()).replace(job, "JOB")))
            return told

        done = await dadi(image(private), "--platform", PLATFORM, "--superpeer", run.url, *LOGIN, stdin=SECRET)
        assert done.exit_code == 0, done.output
        for headers in ({}, wrong):
            for parameters in ({}, {"reference": image(private)}):
                told = await answers(headers, **parameters)
                assert told[::2] == told[1::2]
                assert {status for status, _ in told} == ({403} if parameters else {404})
        private.script("/manifests/", *[Fault(status=503)] * 1000)
        away = shown.header(Credentials(USER, "another"))
        for parameters, status in (({}, 404), ({"reference": image(private)}, 503)):
            told = await answers(away, **parameters)
            assert told[::2] == told[1::2]
            assert {each for each, _ in told} == {status}, "nobody knows whether he may"
        with_it = await answers(right, reference=image(private))
        assert [status for status, _ in with_it[:2]] == [200, 404], "his yes is remembered"
        other = await answers(right, reference=f"{private.host}/team/app:2")
        assert [status for status, _ in other[:2]] == [404, 404], "that is another image's job"


async def test_its_jobs_are_listed_to_whom_the_registry_accepts(tmp_path: Path, private: FakeRegistry) -> None:
    async with running(tmp_path / "s", private.host, authorization="registry") as run:
        whom = ("--superpeer", run.url)
        await dadi(image(private), "--platform", PLATFORM, *whom, *LOGIN, stdin=SECRET)
        assert "no jobs" in (await dadi("list", *whom)).output
        assert "no jobs" in (await dadi("list", *whom, "--registry", private.host)).output
        listed = await dadi("list", *whom, "--registry", private.host, *LOGIN, "--json", stdin=SECRET)
        assert [row["request"]["reference"] for row in told(listed)] == [image(private)]


async def test_nodes_hear_of_private_images_that_they_may_have_and_of_no_others(
    tmp_path: Path, private: FakeRegistry
) -> None:
    async def credentials(reference: Reference) -> Credentials | None:
        return Credentials(USER, SECRET) if reference.registry == private.host else None

    async with FakeRegistry() as public:
        other = await indexed.add(public, "team/public", TARS[:1], tmp_path)
        hosts = (private.host, public.host)
        async with (
            running(tmp_path / "s", *hosts, authorization="registry") as run,
            node(tmp_path, run.url, "stranger") as stranger,
            node(tmp_path, run.url, "friend", credentials=credentials) as friend,
        ):
            request = canonical(Request(image(private), PLATFORM, nodes="all"))
            job = await run.superpeer.prefetch.submit(request, Credentials(USER, SECRET))
            await until(job.id, run, State.READY)
            shared = await run.superpeer.prefetch.submit(canonical(Request(other.reference, PLATFORM, nodes="all")))
            await until(shared.id, run, State.READY)
            for _ in range(2):
                await stranger.warmer.once()
                assert (job.nodes, shared.nodes) == ({}, {"ready": 1})
                assert stranger.warmer._any_token(), "the second time it has a token, for something else"
            await friend.warmer.once()
            assert (job.nodes, shared.nodes) == ({"ready": 1}, {"ready": 2})


async def test_what_is_pinned_is_told_to_those_who_may_have_the_image_and_to_no_others(
    tmp_path: Path, private: FakeRegistry
) -> None:
    async def credentials(reference: Reference) -> Credentials | None:
        return Credentials(USER, SECRET)

    async def told(run: Running, have: str) -> Wishes:
        where = f"{run.url}/v1/prefetch/wanted"
        async with http.client() as session:
            parameters = {"node": "anybody", "have": have}
            async with http.request(session, "GET", where, "asking", params=parameters) as response:
                return decode_wishes(await response.read())

    async with (
        running(tmp_path / "s", private.host, authorization="registry") as run,
        node(tmp_path, run.url, "friend", credentials=credentials) as friend,
        node(tmp_path, run.url, "holder", credentials=credentials) as holder,
    ):
        prefetch = run.superpeer.prefetch
        request = canonical(Request(image(private), PLATFORM, nodes="all", pin_until=1e10))
        job = await prefetch.submit(request, Credentials(USER, SECRET))
        await until(job.id, run, State.READY)
        for each in (friend, holder):
            await each.warmer.once()
            assert each.warmer.statistics()["pinned"] == 1
        assert (await told(run, job.id)).pinned == ()
        assert await told(run, "") == await told(run, job.id), "a guess is not answered"

        async def nothing(reference: Reference) -> Credentials | None:
            return None

        holder.client.access._credentials = nothing  # as where it had a pull secret: its token speaks for it
        holder.warmer._any_token = dict  # the one that it shows first is another image's
        job.state = State.FAILED  # asked for again since, and its registry was away
        for each in (friend, holder):
            await each.warmer.once()
            assert each.warmer.statistics()["pinned"] == 1, each.warmer._place()
        await prefetch.cancel(job.id)
        for each in (friend, holder):
            await each.warmer.once()
            assert each.warmer.statistics()["pinned"] == 0


async def test_a_registry_that_cannot_be_asked_who_may_ends_no_pin(tmp_path: Path, private: FakeRegistry) -> None:
    async with running(tmp_path / "s", private.host, authorization="registry") as run:
        prefetch = run.superpeer.prefetch
        made = canonical(Request(image(private), PLATFORM, nodes="all", pin_until=1e10))
        job = await prefetch.submit(made, Credentials(USER, SECRET))
        await until(job.id, run, State.READY)
        async with node(tmp_path, run.url, "one") as one:
            held = contextlib.ExitStack()
            one.warmer._pins[job.id] = 1e10, held
            private.script("", *[Fault(drop=True)] * 5000)
            await one.warmer.once()
            assert one.warmer.statistics()["pinned"] == 1
            private._script.clear()
            async with asyncio.timeout(20):
                while one.warmer.statistics()["pinned"]:  # what the registry says is remembered for a moment
                    await one.warmer.once()
                    await asyncio.sleep(0.1)


class TestOperators:
    @pytest.fixture
    async def file(self, tmp_path: Path) -> Path:
        hashed = hashlib.sha256(TOKEN.encode()).hexdigest()
        await asyncio.to_thread((tmp_path / "operators").write_text, f"token sha256:{hashed} alice\n")
        await asyncio.to_thread((tmp_path / "token").write_text, f"{TOKEN}\n")
        return tmp_path / "operators"

    async def test_who_is_none_may_look_and_change_nothing(
        self, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        async with FakeRegistry() as registry:
            made = await indexed.add(registry, "team/app", TARS, tmp_path)
            config = PrefetchConfig(operators=str(file))
            async with running(tmp_path / "s", registry.host, authorization="registry", prefetch=config) as run:
                about = (made.reference, "--platform", PLATFORM, "--superpeer", run.url)
                refused = await dadi(*about)
                assert refused.exit_code == 1
                assert "for operators (--operator-token-file" in refused.output
                assert run.superpeer.prefetch.jobs() == []
                done = await dadi(*about, "--operator-token-file", tmp_path / "token")
                assert done.exit_code == 0, done.output
                assert (await dadi("status", *about)).exit_code == 0
                assert (await dadi("verify", *about)).exit_code == 0
                assert (await dadi("retry", *about)).exit_code == 1
                assert (await dadi("cancel", *about)).exit_code == 1
                (job,) = run.superpeer.prefetch.jobs()
                changed = job.changed
                monkeypatch.setenv("DADI_OPERATOR_TOKEN_FILE", str(tmp_path / "token"))
                assert (await dadi("retry", *about)).exit_code == 0
                await until(job.id, run, State.READY)
                assert job.changed > changed
        output = capfd.readouterr()
        assert TOKEN not in output.out + output.err + refused.output + done.output
        assert await asyncio.to_thread(written, tmp_path / "s", TOKEN) == []

    async def test_siblings_do_their_part_of_what_an_operator_asked_one_for(self, tmp_path: Path, file: Path) -> None:
        async with FakeRegistry() as registry:
            config = PrefetchConfig(operators=str(file))
            async with datacenter(tmp_path, registry.host, authorization="registry", prefetch=config) as dc:
                made = await indexed.add(registry, "team/app", layers_owned_by_both(dc.urls), tmp_path)
                started = await dadi(made.reference, "--platform", PLATFORM, "--superpeer", dc.urls[0], "--detach",
                                     "--operator-token-file", tmp_path / "token")  # fmt: skip
                assert started.exit_code == 0, started.output
                job = job_id(canonical(Request(made.reference, PLATFORM)))
                for url in dc.urls:
                    await until(job, dc.running[url], State.READY)

    async def test_a_client_certificate_that_is_named_will_do(self, tmp_path: Path, file: Path) -> None:
        from dadi.tls import TlsConfig
        from tests.fakes.authority import Authority

        authority = await asyncio.to_thread(Authority, tmp_path / "tls")
        certificate, key = await asyncio.to_thread(authority.issue, "superpeer")
        tls = TlsConfig(certificate=certificate, key=key, ca=authority.file, client_ca=authority.file)
        await asyncio.to_thread(file.write_text, "client operator\n")
        async with FakeRegistry() as registry:
            made = await indexed.add(registry, "team/app", TARS, tmp_path)
            config = PrefetchConfig(operators=str(file))
            async with running(tmp_path / "s", registry.host, tls=tls, prefetch=config) as run:
                results = {}
                for name in ("operator", "node"):
                    mine, my_key = await asyncio.to_thread(authority.issue, name)
                    section = f'[tls]\ncertificate = "{mine}"\nkey = "{my_key}"\nca = "{authority.file}"\n'
                    there = tmp_path / f"{name}.toml"
                    await asyncio.to_thread(there.write_text, f'[datacenters]\nfra1 = ["{run.url}"]\n{section}')
                    results[name] = await dadi(made.reference, "--platform", PLATFORM, "--datacenters-file", there,
                                               "--all")  # fmt: skip
                assert results["operator"].exit_code == 0, results["operator"].output
                assert results["node"].exit_code == 1
                assert "for operators" in results["node"].output


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("a.example/a", "--username", "me"), "", "go together"),
        (("a.example/a", "b.example/b", *LOGIN), "x", "is for one registry"),
        (("-f", "-", *LOGIN), "x", "cannot be both"),
        (("a.example/a", *LOGIN), "\n", "has no password"),
        (("a.example/a", "--operator-token-file", "/nonexistent"), "", "cannot be read"),
        (("a.example/a", "--operator-token-file", "/dev/null"), "", "holds no operator's token"),
    ],
)
async def test_what_cannot_be_meant_is_said(arguments: tuple[str, ...], stdin: str, said: str) -> None:
    result = await dadi(*arguments, "--superpeer", "http://127.0.0.1:1", stdin=stdin)
    assert result.exit_code == 1
    assert said in str(result.exception)
