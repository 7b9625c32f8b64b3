"""What all tests share: requirements that this machine may lack, and the asyncio hygiene of the suite."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sys
from collections.abc import Iterator

import hypothesis
import pytest
from blockbuster import blockbuster_ctx

from tests.lab import bytecode


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.register_profile("dadi", deadline=None)  # a busy machine is no finding
    hypothesis.settings.load_profile("dadi")
    config.addinivalue_line("markers", "root: needs root, /dev/fuse and loop devices")
    config.addinivalue_line("markers", "programs(*names): needs these programs")
    os.environ.update(bytecode.environment())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("root"):
            why = _why_not_root()
            if why:
                item.add_marker(pytest.mark.skip(reason=why))
        for marker in item.iter_markers("programs"):
            lacking = [name for name in marker.args if not shutil.which(name)]
            if lacking:
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(lacking)} (scripts/setup does it)"))


def _why_not_root() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not os.access(path, os.R_OK | os.W_OK):
            return f"needs {path}"
    return None


@pytest.fixture(autouse=True, scope="session")
def grpc_is_not_shut_down_between_tests() -> None:
    """Hold gRPC's event loop thread: the collector would end it, and wait for it, in the middle of any later test."""
    if "grpc" in sys.modules:
        cygrpc = importlib.import_module("grpc._cython.cygrpc")
        cygrpc.init_grpc_aio()


@pytest.fixture(autouse=True)
def nothing_is_left_for_the_collector() -> Iterator[None]:
    """Collect after each test, so that an unclosed socket or an unawaited task is blamed on the test that left it."""
    yield
    gc.collect(0)


@pytest.fixture(autouse=True)
def nothing_blocks_the_event_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Raise BlockingError where our code makes a call on the event loop that may wait for a disk or a network."""
    with blockbuster_ctx(scanned_modules=["dadi", "superpeer", "registry_proxy", "fuse"]) as blockbuster:
        for function in blockbuster.functions.values():
            # Opening a store blocks, and says so: programs do it in a thread, tests need not.
            function.can_block_in("dadi/blobs/disk.py", {"__init__"})
        # To a socket that does not block, of pages that are in the cache: as asyncio does itself.
        blockbuster.functions["os.sendfile"].can_block_in("dadi/blobs/sending.py", {"_sent_at_once"})
        yield
