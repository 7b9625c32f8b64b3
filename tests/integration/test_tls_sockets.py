"""TLS and mutual TLS over real sockets: who is refused, what new files change, and that the bytes stay the same.

A little longer than 400 lines: the same listener and clients, through all that certificates can be.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from dadi import http
from dadi.blobs import sending
from dadi.errors import ConfigError, DadiError, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index import image as image_index
from dadi.peers.superpeer import SuperpeerClient, image_answer
from dadi.tls import Tls, TlsConfig
from tests.contracts.store import content
from tests.fakes.authority import HOUR, Authority
from tests.fakes.registry import FakeRegistry
from tests.lab.processes import REPOSITORY
from tests.lab.services import PLATFORM, running, tar_of


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "tls")


@contextlib.asynccontextmanager
async def opened(config: TlsConfig) -> AsyncIterator[Tls]:
    tls = Tls(config, Fallbacks())
    try:
        await tls.start()
        yield tls
    finally:
        await tls.close()


@contextlib.asynccontextmanager
async def listening(config: TlsConfig) -> AsyncIterator[tuple[Tls, str]]:
    """Serve "hello" with this TLS; give it and the address."""

    async def hello(request: web.Request) -> web.Response:
        assert request.transport is not None
        port = request.transport.get_extra_info("peername")[1]
        return web.Response(text="hello", headers={"Your-Port": str(port)})

    app = http.application()
    app.router.add_get("/", hello)
    async with opened(config) as tls:
        runner, address = await http.serve_tcp(app, "127.0.0.1:0", tls)
        try:
            yield tls, address
        finally:
            await runner.cleanup()


async def get(session: aiohttp.ClientSession, url: str) -> str:
    async with http.request(session, "GET", url, "saying hello") as response:
        return await response.text()


async def ask(url: str, config: TlsConfig) -> str:
    """Ask once, over a connection of its own."""
    async with opened(config) as tls, http.client(connect=3, read=5, tls=tls) as session:
        return await get(session, url)


def shown_by(address: str, authority: Authority) -> bytes:
    """Return the certificate (DER) that new connections are shown."""
    host, _, port = address.rpartition(":")
    pem = ssl.get_server_certificate((host, int(port)), timeout=5)
    return ssl.PEM_cert_to_DER_cert(pem)


def der(path: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(Path(path).read_text())


def section(authority: Authority, name: str, names: tuple[str, ...] = ("127.0.0.1",), **more: object) -> TlsConfig:
    certificate, key = authority.issue(name, names)
    return TlsConfig(certificate=certificate, key=key, ca=authority.file, **more)


# ---- who is refused


async def test_a_client_that_trusts_the_authority_is_answered(authority: Authority) -> None:
    async with listening(section(authority, "server")) as (tls, address):
        assert await ask(f"https://{address}/", TlsConfig(ca=authority.file)) == "hello"
        assert (tls.statistics()["handshakes"], tls.statistics()["refused"]) == (1, 0)


async def test_a_plain_client_gets_nothing(authority: Authority) -> None:
    async with listening(section(authority, "server")) as (_, address), http.client(connect=3, read=5) as session:
        with pytest.raises(Unavailable):
            await get(session, f"http://{address}/")


async def test_a_client_with_tls_does_not_speak_in_the_clear(authority: Authority) -> None:
    asked: list[str] = []

    async def hello(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(text="hello")

    app = http.application()
    app.router.add_get("/", hello)
    runner, address = await http.serve_tcp(app, "127.0.0.1:0")
    try:
        with pytest.raises(ConfigError, match="is not encrypted"):
            await ask(f"http://{address}/", TlsConfig(ca=authority.file))
        with pytest.raises(Unavailable, match="does not speak TLS"):
            await ask(f"https://{address}/", TlsConfig(ca=authority.file))
    finally:
        await runner.cleanup()
    assert asked == []


async def test_a_listener_is_refused_whose_authority_name_or_time_is_wrong(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger", "stranger")
    trusting = TlsConfig(ca=authority.file)
    for config, said in [
        (section(stranger, "foreign"), "unable to get local issuer certificate|self-signed"),
        (section(authority, "elsewhere", ("203.0.113.1", "elsewhere.test")), "mismatch"),
    ]:
        async with listening(config) as (_, address):
            with pytest.raises(Unavailable, match=said) as raised:
                await ask(f"https://{address}/", trusting)
            assert "certificate is refused" in raised.value.message
            assert "tls.ca" in (raised.value.hint or "")
    certificate, key = authority.issue("old", begins=-3 * HOUR, ends=-HOUR)
    async with listening(TlsConfig(certificate=certificate, key=key, ca=authority.file)) as (_, address):
        with pytest.raises(Unavailable, match="certificate has expired"):
            await ask(f"https://{address}/", trusting)


async def test_peer_name_is_what_a_listener_at_an_address_must_have(authority: Authority) -> None:
    async with listening(section(authority, "node", ("node.test",))) as (_, address):
        assert await ask(f"https://{address}/", TlsConfig(ca=authority.file, peer_name="node.test")) == "hello"
        for wrong in (TlsConfig(ca=authority.file, peer_name="superpeer.test"), TlsConfig(ca=authority.file)):
            with pytest.raises(Unavailable, match="mismatch"):
                await ask(f"https://{address}/", wrong)
    async with listening(section(authority, "superpeer", ("localhost",))) as (_, address):
        by_name = f"https://localhost:{address.rpartition(':')[2]}/"
        assert await ask(by_name, TlsConfig(ca=authority.file, peer_name="node.test")) == "hello", "names stay names"


async def test_mutual_tls_takes_only_clients_of_its_authority(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger", "stranger")
    foreign, expired = stranger.issue("client"), authority.issue("expired", begins=-3 * HOUR, ends=-HOUR)
    async with listening(section(authority, "server", client_ca=authority.file)) as (tls, address):
        assert await ask(f"https://{address}/", section(authority, "client")) == "hello"
        for config, why in [
            (TlsConfig(ca=authority.file), "peer did not return a certificate"),
            (TlsConfig(certificate=foreign[0], key=foreign[1], ca=authority.file), "unable to get local issuer"),
            (TlsConfig(certificate=expired[0], key=expired[1], ca=authority.file), "certificate has expired"),
        ]:
            with pytest.raises(Unavailable) as raised:
                await ask(f"https://{address}/", config)
            assert why in tls.statistics()["refused_why"]
            assert "its tls.client_ca must have signed our tls.certificate" in (raised.value.hint or "")


# ---- files that are replaced


async def test_new_connections_have_new_files_and_old_connections_go_on(authority: Authority) -> None:
    config = section(authority, "server", client_ca=authority.file)
    async with (
        listening(config) as (tls, address),
        opened(section(authority, "client")) as ours,
        http.client(connect=3, read=5, tls=ours) as session,
    ):

        async def port_of_hello() -> str:
            async with http.request(session, "GET", f"https://{address}/", "saying hello") as response:
                assert await response.text() == "hello"
                return response.headers["Your-Port"]

        port = await port_of_hello()
        before = await asyncio.to_thread(shown_to_client, address, ours)
        authority.issue("server")
        assert await tls.refresh()
        assert await port_of_hello() == port, "the connection that stands goes on"
        after = await asyncio.to_thread(shown_to_client, address, ours)
        assert before != after == der(config.certificate)


def shown_to_client(address: str, tls: Tls) -> bytes:
    """Return the certificate (DER) that a new connection of this client is shown, after a verified handshake."""
    host, _, port = address.rpartition(":")
    context = tls.current(server_side=False)
    with socket.create_connection((host, int(port)), timeout=5) as plain:
        with context.wrap_socket(plain, server_hostname=host) as encrypted:
            found = encrypted.getpeercert(binary_form=True)
    assert found
    return found


async def test_a_client_shows_its_new_certificate(authority: Authority) -> None:
    seen: list[bytes] = []

    async def hello(request: web.Request) -> web.Response:
        assert request.transport is not None
        seen.append(request.transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
        return web.Response(text="hello", headers={"Connection": "close"})

    app = http.application()
    app.router.add_get("/", hello)
    mine = section(authority, "client")
    async with (
        opened(section(authority, "server", client_ca=authority.file)) as tls,
        opened(mine) as ours,
        http.client(connect=3, read=5, tls=ours) as session,
    ):
        runner, address = await http.serve_tcp(app, "127.0.0.1:0", tls)
        try:
            first = der(mine.certificate)
            await get(session, f"https://{address}/")
            authority.issue("client")
            await ours.refresh()
            await get(session, f"https://{address}/")
        finally:
            await runner.cleanup()
    assert seen == [first, der(mine.certificate)]


async def test_broken_new_files_keep_the_old_ones_serving(authority: Authority) -> None:
    config = section(authority, "server")
    async with listening(config) as (tls, address):
        before = der(config.certificate)
        Path(config.certificate).write_text("half of a certi")
        assert not await tls.refresh()
        assert await asyncio.to_thread(shown_by, address, authority) == before
        assert await ask(f"https://{address}/", TlsConfig(ca=authority.file)) == "hello"
        assert config.certificate in tls.statistics()["error"]


# ---- bytes


async def test_ranges_under_tls_are_the_bytes(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = tar_of(a=content(3_000_000), b=b"b" * 10)
    config = section(authority, "superpeer")
    cached = 0
    really = sending.cached

    def sometimes(fd: int, offset: int, length: int) -> memoryview | None:
        # What is not in the page cache is read in a thread; what is there in part is sent in parts.
        nonlocal cached
        cached += 1
        return [really(fd, offset, length), None, really(fd, offset, max(1, length // 3))][cached % 3]

    monkeypatch.setattr(sending, "cached", sometimes)
    async with FakeRegistry() as registry:
        registry.add_image("team/app", "1", [layer])
        async with (
            running(tmp_path / "superpeer", registry.host, tls=config, authorization="open") as run,
            opened(TlsConfig(ca=authority.file)) as ours,
            http.client(tls=ours) as session,
        ):
            index = await run.index(f"{registry.host}/team/app:1")
            blob = index.layers[0].blob
            chunks = await run.client.source.read(blob, range(blob.table.count))
            assert b"".join(chunks) == layer
            url = f"{run.url}/v1/blobs/{blob.digest}"
            size = len(layer)
            for first, last in [(0, 0), (5, 16_388), (1, 300_000), (99_999, 2_999_999), (size - 5, size - 1)]:
                async with session.get(url, headers={"Range": f"bytes={first}-{last}"}) as response:
                    assert (response.status, await response.read()) == (206, layer[first : last + 1])
            async with session.get(url) as response:
                assert (response.status, await response.read()) == (200, layer)
    assert cached > 20


async def test_a_reader_that_does_not_read_is_given_up_under_tls(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "STALLED", 0.2)
    layer, config = tar_of(a=os.urandom(20 << 20)), section(authority, "superpeer")
    async with FakeRegistry() as registry:
        registry.add_image("team/app", "1", [layer])
        async with (
            running(tmp_path / "superpeer", registry.host, tls=config, authorization="open") as run,
            opened(TlsConfig(ca=authority.file)) as ours,
        ):
            index = await run.index(f"{registry.host}/team/app:1")
            host, _, port = run.url.removeprefix("https://").rpartition(":")
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=ours.client, server_hostname=host, limit=1 << 10
            )
            try:
                writer.write(f"GET /v1/blobs/{index.layers[0].diff_id} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                await writer.drain()
                await asyncio.sleep(1)  # longer than a stalled reader is borne with
                got = 0
                with contextlib.suppress(OSError):
                    assert b" 200 " in await reader.readline()
                    while piece := await reader.read(1 << 20):
                        got += len(piece)
                assert got < len(layer)
            finally:
                writer.transport.abort()


# ---- the program


async def test_the_program_serves_over_mutual_tls_and_takes_new_files_by_itself(
    tmp_path: Path, authority: Authority
) -> None:
    config = section(authority, "superpeer", client_ca=authority.file, refresh=1.0)
    mine = section(authority, "node")
    layer = tar_of(a=content(2_000_000))
    async with FakeRegistry() as registry:
        registry.add_image("team/app", "1", [layer])
        async with program(tmp_path, registry.host, config) as url:
            with pytest.raises(Unavailable):
                await ask(f"{url}/healthz", TlsConfig(ca=authority.file))
            async with opened(mine) as ours:
                client = SuperpeerClient([url], Fallbacks(), connect=3, read=10, tls=ours)
                try:
                    assert await first_layer(client, f"{registry.host}/team/app:1") == layer
                    address = url.removeprefix("https://")
                    authority.issue("superpeer")
                    async with asyncio.timeout(20):
                        while await asyncio.to_thread(shown_to_client, address, ours) != der(config.certificate):
                            await asyncio.sleep(0.1)
                    assert await first_layer(client, f"{registry.host}/team/app:1") == layer
                finally:
                    await client.close()
            status = msgspec.json.decode(await ask(f"{url}/v1/status", mine))
            assert status["tls"]["mutual"]
            assert status["tls"]["reloads"] == 1
            assert "dadi_superpeer_tls_reloads 1.0" in await ask(f"{url}/metrics", mine)


async def test_the_program_says_which_file_is_wrong(tmp_path: Path, authority: Authority) -> None:
    config = TlsConfig(certificate=str(tmp_path / "missing.pem"), key=authority.issue("one")[1])
    with pytest.raises(DadiError, match=r"tls.certificate: .*missing.pem cannot be read"):
        async with program(tmp_path, "127.0.0.1:1", config):
            pass


async def first_layer(client: SuperpeerClient, reference: str) -> bytes:
    async with contextlib.aclosing(client.resolve(reference, PLATFORM)) as events:
        (answer,) = [image_answer(event) async for event in events if event["event"] == "image"]
    index = image_index.decode(await client.whole(answer.index_digest, answer.index_size))
    blob = index.layers[0].blob
    return b"".join(await client.source.read(blob, range(blob.table.count)))


@contextlib.asynccontextmanager
async def program(directory: Path, registry: str, tls: TlsConfig) -> AsyncIterator[str]:
    """Run `dadi-superpeer` with this section; give its URL. Raises DadiError with what it said if it does not start."""
    file = directory / "superpeer.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in msgspec.structs.asdict(tls).items()]
    file.write_text(
        f'listen = "127.0.0.1:0"\nstate = "{directory / "state"}"\nlog_json = true\n[tls]\n' + "\n".join(lines) +
        f'\n[registry]\nallowed = ["{registry}"]\nplain_http = ["{registry}"]\n'
    )  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "superpeer", "--config", str(file), env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    said: list[str] = []

    async def until(found: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        assert process.stdout is not None
        async for line in process.stdout:
            said.append(line.decode())
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
                if found(event):
                    return dict(event)
        raise DadiError("".join(said))

    draining = None
    try:
        async with asyncio.timeout(30):
            ready = await until(lambda event: event.get("event") == "superpeer is ready")
        draining = asyncio.create_task(process.stdout.read())
        yield f"https://{ready['address']}"
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await process.wait()
        if draining:
            await draining
