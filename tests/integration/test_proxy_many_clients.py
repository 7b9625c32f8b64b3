"""A thousand clients of one proxy at once, on one blob: each gets it, slow or not, from one fetch, in little memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import socket
import sys
from pathlib import Path

import pytest

from tests.fakes.registry import FakeRegistry
from tests.lab.cleanup import Lab
from tests.lab.processes import Process

CLIENTS = 1000
DATA = hashlib.shake_256(b"many").digest(8 << 20)
"""More than the kernel takes for somebody who does not read."""
_MIB = 1 << 20


@pytest.fixture(autouse=True)
def descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4 * CLIENTS:
        pytest.skip(f"{hard} descriptors are too few")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Client:
    """One connection with a small window, which reads as it is told."""

    def __init__(self, address: tuple[str, int], path: str) -> None:
        self._address, self._path = address, path
        self._found, self._left = hashlib.sha256(), len(DATA)

    async def begin(self) -> None:
        """Ask, and read the first bytes."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 10)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self._address)
        self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=4 << 10)
        self._writer.write(f"GET {self._path} HTTP/1.1\r\nHost: proxy\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        await self._take(1000)

    async def end(self) -> str:
        """Read the rest; return the digest of all."""
        while self._left:
            await self._take(64 << 10)
        self._writer.close()
        return "sha256:" + self._found.hexdigest()

    def leave(self) -> None:
        """Go away in the middle."""
        self._writer.transport.abort()

    async def _take(self, most: int) -> None:
        piece = await self._reader.read(most)
        assert piece, f"cut off {self._left} bytes before the end"
        self._found.update(piece)
        self._left -= len(piece)


async def test_a_thousand_slow_clients_are_served_from_one_fetch_and_hold_nobody_up(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        digest = registry.add_blob(DATA)
        path = f"/v2/team/app/blobs/{digest}?ns={registry.host}"
        with Lab("many", tmp_path) as lab:
            config = tmp_path / "proxy.toml"
            config.write_text(f'listen = "127.0.0.1:0"\nstate = "{tmp_path / "state"}"\nlog_json = true\n[registry]\n'
                              f'allowed = ["{registry.host}"]\nplain_http = ["{registry.host}"]\n')  # fmt: skip
            proxy = Process(lab, "proxy", [sys.executable, "-m", "registry_proxy", "--config", str(config)])
            await asyncio.to_thread(proxy.wait_until, lambda: any("address" in event for event in proxy.events()))
            host, _, port = next(event["address"] for event in proxy.events() if "address" in event).rpartition(":")
            address = host, int(port)
            before = proxy.memory()
            clients = [Client(address, path) for _ in range(CLIENTS)]
            async with asyncio.timeout(60):
                await asyncio.gather(*(client.begin() for client in clients))
            open_files = len(os.listdir(f"/proc/{proxy.popen.pid}/fd"))
            assert await served(address) < CLIENTS * len(DATA) // 2, "they are slow"
            hasty = Client(address, path)
            async with asyncio.timeout(10):
                await hasty.begin()
                assert await hasty.end() == digest
            async with asyncio.timeout(60):
                for number, client in enumerate(clients):
                    if number % 10:
                        client.leave()
                    else:
                        assert await client.end() == digest
            grown = (proxy.peak_memory() - before) / _MIB
            print(f"{CLIENTS} clients: {open_files} descriptors, {grown:.0f} MiB more at the peak")
            assert grown < 128, "not what they have not taken"
            assert open_files < 3 * CLIENTS + 100
            assert len(registry.asked(f"/blobs/{digest}", "GET")) == 1
            await asyncio.to_thread(proxy.wait_until, lambda: len(os.listdir(f"/proc/{proxy.popen.pid}/fd")) < 100)


async def served(address: tuple[str, int]) -> int:
    """Return how many bytes of blobs have been given, as the proxy says."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /v1/status HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n")
    body = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    count: int = json.loads(body)["served"]["bytes"]
    return count
