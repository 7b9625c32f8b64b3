"""The fake store keeps the contract."""

from __future__ import annotations

import pytest

from dadi.blobs.store import BlobStore
from tests.contracts.store import LIMIT, StoreContract
from tests.fakes.memory_blobs import MemoryBlobs


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> BlobStore:
        return MemoryBlobs(limit=LIMIT)
