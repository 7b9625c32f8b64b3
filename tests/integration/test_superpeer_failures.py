"""A superpeer whose disk fails it for a while: what it has learnt of who may is not lost by that."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dadi.errors import AccessDenied
from dadi.oci.reference import Reference
from superpeer import verdicts
from tests.fakes.registry import status
from tests.lab.access import GOOD, Clock, own_credentials, private_registry, value
from tests.lab.services import running


def full(path: Path, data: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def may(run, reference: Reference) -> bool:
    try:
        await run.who_may.check(reference, value(GOOD))
    except AccessDenied:
        return False
    return True


async def test_a_no_that_could_not_be_written_is_written_later_and_outlives_the_superpeer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or who has lost access would have it back after a restart, for as long as the registry is away."""
    clock = Clock()
    async with private_registry() as registry:
        options = {"docker_config": own_credentials(tmp_path / "config.json", registry), "clock": clock,
                   "authorization_ttl": 60}  # fmt: skip
        reference = Reference.parse(f"{registry.host}/team/app:1")
        async with running(tmp_path, registry.host, **options) as run:
            assert await may(run, reference)
            await run.who_may._verdicts._save()
            clock.ahead += 61
            registry.script("/manifests/", *[status(403)] * 2, method="HEAD")
            assert not await may(run, reference)
            with monkeypatch.context() as patch:
                patch.setattr(verdicts, "write_durably", full)
                await run.who_may._verdicts._save()
        registry.script("", *[status(503)] * 99)
        async with running(tmp_path, registry.host, **options) as run:
            assert not await may(run, reference)


async def test_what_registries_said_is_asked_again_where_the_file_of_it_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o700)
    (tmp_path / "keys" / "verdicts.json").write_bytes(b'[["canary"')
    async with private_registry() as registry:
        own = own_credentials(tmp_path / "config.json", registry)
        async with running(tmp_path, registry.host, docker_config=own) as run:
            assert await may(run, Reference.parse(f"{registry.host}/team/app:1"))
            told = str(run.superpeer.fallbacks.statistics())
    assert "what registries said was lost" in told
    assert "canary" not in told
