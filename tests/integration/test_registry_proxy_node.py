"""The proxy that a node without superpeers embeds: the same options as for one by itself."""

from __future__ import annotations

import tempfile

import aiohttp
import msgspec

from dadi.node.config import NodeConfig
from dadi.node.node import Node
from dadi.node.proxying import PlainPulls
from tests.fakes.registry import FakeRegistry

MANIFEST = "/v2/team/app/manifests/1"


async def test_what_is_configured_of_originals_holds_for_plain_pulls() -> None:
    async with FakeRegistry() as registry:
        registry.add_image("team/app", "1", [b"layer"])
        # not pytest's own directory: the path of a unix socket must not be longer than 107 bytes
        with tempfile.TemporaryDirectory(prefix="plain") as directory:
            hosts = f'["{registry.host}"]'
            text = (
                f'state = "{directory}/state"\nrun = "{directory}/run"\n[backfill]\nenabled = false\n'
                f'[proxy]\nenabled = true\nlisten = "127.0.0.1:0"\nupstream = "{registry.host}"\n'
                f"[originals]\ntag_ttl = 0.0\n[registry]\nallowed = {hosts}\nplain_http = {hosts}\n"
            )
            node = await Node.start(msgspec.toml.decode(text.encode(), type=NodeConfig))
            try:
                pulls = await PlainPulls.start(node)
                try:
                    async with aiohttp.ClientSession() as session:
                        for _ in range(3):
                            async with session.get(f"http://{pulls.address}{MANIFEST}") as response:
                                assert response.status == 200
                finally:
                    await pulls.close()
            finally:
                await node.close()
        assert len(registry.asked(MANIFEST, "GET")) == 1
        assert len(registry.asked(MANIFEST, "HEAD")) >= 2, "a tag is never believed"
