"""The superpeer's process and the command line are killed in the middle of a job: it completes, and costs one copy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi import digest as digests
from dadi import http
from dadi.errors import DadiError
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.network import free_ports
from tests.lab.services import CHUNK, PLATFORM, tar_of

ROOT = Path(__file__).parents[2]
TARS = [tar_of(**{f"file-{seed}": content(400_000, seed)}) for seed in range(3)]


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


@contextlib.asynccontextmanager
async def program(*arguments: str, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", *arguments, cwd=ROOT, stdout=output,
                                                       stderr=output)  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def ready(url: str) -> None:
    async with asyncio.timeout(60), http.client(connect=1.0) as session:
        while True:
            with contextlib.suppress(DadiError):
                async with http.request(session, "GET", f"{url}/healthz", "asking"):
                    return
            await asyncio.sleep(0.05)


def asked_bytes(registry: FakeRegistry, layers: list[str]) -> int:
    """Return the bytes of layers that were asked for."""
    total = 0
    for digest in layers:
        for seen in registry.asked(f"/blobs/{digest}", "GET"):
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", seen.headers.get("Range", ""))
            total += int(match[2]) - int(match[1]) + 1 if match else len(registry.blobs[digest])
    return total


async def until_kept(url: str, size: int) -> None:
    """Wait until the superpeer's store holds so many bytes."""
    async with http.client(connect=1.0) as session:
        while True:
            async with http.request(session, "GET", f"{url}/v1/status", "asking") as response:
                if (await response.json())["store"]["bytes"] >= size:
                    return
            await asyncio.sleep(0.01)


async def test_a_job_survives_the_superpeer_and_the_command_that_began_it(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    layers = [digests.of(layer) for layer in made.layers]
    gate = asyncio.Event()
    registry.script(f"/blobs/{layers[-1]}", Fault(gate=gate), method="GET")
    (port,) = free_ports(1)
    url, config, state = f"http://127.0.0.1:{port}", tmp_path / "superpeer.toml", tmp_path / "state"
    hosts = json.dumps([registry.host])
    text = f'listen = "127.0.0.1:{port}"\nstate = "{state}"\n[indexing]\nchunk_size = {CHUNK}\n' \
           f"[registry]\nallowed = {hosts}\nplain_http = {hosts}\n"  # fmt: skip
    await asyncio.to_thread(config.write_text, text)
    about = ("dadi.cli", "prefetch", made.reference, "--platform", PLATFORM, "--superpeer", url)
    log = tmp_path / "log"
    daemon = ("superpeer", "--config", str(config))
    async with program(*daemon, log=log) as superpeer:
        await ready(url)
        async with program(*about, log=log) as command:
            async with asyncio.timeout(60):
                while not all(registry.asked(f"/blobs/{digest}", "GET") for digest in layers):
                    await asyncio.sleep(0.01)
                # as they came and unpacked: nothing of the other layers is under way any more
                await until_kept(url, sum(map(len, [*made.layers[:-1], *TARS[:-1]])))
            command.send_signal(signal.SIGKILL)
            superpeer.send_signal(signal.SIGKILL)
            await asyncio.gather(command.wait(), superpeer.wait())
    waiting = asked_bytes(registry, layers[-1:])  # was under way, and never came
    gate.set()
    async with program(*daemon, log=log):
        await ready(url)
        verify = ("dadi.cli", "prefetch", "verify", *about[2:])
        async with asyncio.timeout(60):
            while True:
                async with program(*verify, log=log) as proof:
                    if await proof.wait() == 0:
                        break
    assert asked_bytes(registry, layers) - waiting <= sum(map(len, made.layers)), "what was there was not fetched again"
    assert len(registry.asked("/manifests/1", "GET")) <= 2, "the tag was looked up once (and for who may, by HEAD)"
    kept = await asyncio.to_thread(lambda: [json.loads(path.read_text()) for path in (state / "prefetch").glob("*")])
    assert [job["state"] for job in kept] == ["ready"]
