"""An image of somebody's own that names others' layers, by their digests: plain pulls must not give him their bytes."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import msgspec
import pytest

from dadi import digest as digests
from dadi.errors import DadiError
from dadi.index.seek import SeekTable
from dadi.oci.reference import Reference
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, status
from tests.lab.proxies import RunningProxy, proxied
from tests.lab.services import Running, running, tar_of

TAR = tar_of(a=Random(1).randbytes(500_000))
LAYER = gzip.compress(TAR, 6, mtime=0)
DIGEST = digests.of(LAYER)
GOOD = {"Authorization": "Basic dTpw"}


@pytest.fixture
async def secret() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        indexed._add_image(registry, "team/secret", [LAYER], [digests.of(TAR)])
        yield registry


@contextlib.asynccontextmanager
async def pulled(
    directory: Path, secret: FakeRegistry, own: FakeRegistry
) -> AsyncIterator[tuple[Running, RunningProxy]]:
    """A superpeer and a proxy through which somebody has pulled the private layer."""
    async with running(directory / "s", secret.host, own.host) as run:
        async with proxied(directory / "p", secret.host, superpeers=(run.url,), allowed=[own.host]) as proxy:
            assert (await proxy.get(f"/v2/team/secret/blobs/{DIGEST}", headers=GOOD))[1] == LAYER
            yield run, proxy


@pytest.mark.parametrize("lazily", [False, True])
async def test_who_names_a_private_layer_in_an_indexed_image_has_to_send_it(
    tmp_path: Path, secret: FakeRegistry, lazily: bool
) -> None:
    async with FakeRegistry() as own:
        made = await indexed.add(own, "me/mine", [TAR], tmp_path)
        assert made.layers == [LAYER]
        async with pulled(tmp_path, secret, own) as (run, proxy):
            index = await run.index(made.reference)
            assert index.layers[0].seek_digest
            assert own.asked(f"/blobs/{DIGEST}", "GET") == [], "nothing of it has come so far"
            if lazily:
                await run.superpeer.bring(index.layers[0].blob, range(1))
            else:
                assert (await proxy.get(f"/v2/me/mine/blobs/{DIGEST}?ns={own.host}"))[1] == LAYER
            assert own.asked(f"/blobs/{DIGEST}", "GET"), "he was given what he has not sent"


@pytest.mark.parametrize("honest", [False, True])
async def test_a_digest_is_not_enough(tmp_path: Path, secret: FakeRegistry, honest: bool) -> None:
    """His registry says that it has the layer, and sends nothing; his index has a table of something else, or not."""
    async with FakeRegistry() as own:

        def lie(table: SeekTable) -> SeekTable:
            wrong = msgspec.structs.replace(table.compressed, digests=bytes(len(table.compressed.digests)))
            return table if honest else msgspec.structs.replace(table, compressed=wrong)

        made = await indexed.add(own, "me/mine", [TAR], tmp_path, change_table=lie)
        async with pulled(tmp_path, secret, own) as (run, proxy):
            index = await run.index(made.reference)
            own.script(f"/blobs/{DIGEST}", *[status(404)] * 100, method="GET")
            response, body = await proxy.get(f"/v2/me/mine/blobs/{DIGEST}?ns={own.host}")
            assert (response.status, LAYER[:64] in body) == (404, False)
            with pytest.raises(DadiError):
                await run.superpeer.bring(index.layers[0].blob, range(1))
            assert run.superpeer.store.present_bytes(index.layers[0].blob) == 0
            # Those whose it is are served as before.
            assert (await proxy.get(f"/v2/team/secret/blobs/{DIGEST}", headers=GOOD))[1] == LAYER
    assert len(secret.asked(f"/blobs/{DIGEST}", "GET")) == 1


async def test_what_lazy_reads_have_brought_in_full_is_plain_pulls_too(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        made = await indexed.add(registry, "team/app", [TAR], tmp_path)
        async with running(tmp_path / "s", registry.host) as run:
            layer = (await run.index(made.reference)).layers[0]
            await run.superpeer.bring(layer.blob, range(layer.table.count))
            async with asyncio.timeout(20):
                while not run.superpeer.originals.is_proven(Reference.parse(made.reference), DIGEST):
                    await asyncio.sleep(0.01)
            asked = len(registry.asked(f"/blobs/{DIGEST}", "GET"))
            async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
                assert (await proxy.get(f"/v2/team/app/blobs/{DIGEST}"))[1] == LAYER
            assert len(registry.asked(f"/blobs/{DIGEST}", "GET")) == asked
        async with running(tmp_path / "s", registry.host) as run:
            assert run.superpeer.originals.is_proven(Reference.parse(made.reference), DIGEST), "after a restart, too"
