"""Stores in a temporary folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from conserve_sgl.batch.store import Storage, Store


@pytest.fixture
def storage(tmp_path: Path):
    storage = Storage(tmp_path / "storage")
    yield storage
    storage.release()


@pytest.fixture
async def store(storage: Storage) -> AsyncIterator[Store]:
    store = await Store.open(storage)
    yield store
    await store.close()
