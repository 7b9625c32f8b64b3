"""The fake store keeps the contract."""

from __future__ import annotations

import pytest

from dadi.blobs.memory import MemoryBlobs
from dadi.blobs.store import BlobStore
from tests.contracts.store import LIMIT, StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> BlobStore:
        return MemoryBlobs(limit=LIMIT)
