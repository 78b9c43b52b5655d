"""Stores in a temporary folder, and servers without an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import openai
import pytest

from batch.fake_engine import FakeClock, FakeServer
from conserve_sgl.batch.server.storage import Storage
from conserve_sgl.batch.server.store import Store
from conserve_sgl.config import BatchConfig


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    storage = Storage(tmp_path / "storage")
    yield storage
    storage.release()


@pytest.fixture
async def store(storage: Storage) -> AsyncIterator[Store]:
    store = await Store.open(storage)
    yield store
    await store.close()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., FakeServer]]:
    """Starts a server; all of a test share one storage folder."""
    servers: list[FakeServer] = []

    def start(
        *,
        api_key: str | None = None,
        clock: FakeClock | None = None,
        folder: Path = tmp_path / "storage",
        port: int = 0,
        **config,
    ) -> FakeServer:
        batch_config = BatchConfig(storage_dir=str(folder), **config)
        server = FakeServer(batch_config, api_key=api_key, clock=clock, port=port)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.engine.gate.set()
        server.stop()


@pytest.fixture
def server(start_server) -> FakeServer:
    return start_server()


@pytest.fixture
def connect() -> Iterator[Callable[..., openai.OpenAI]]:
    """Official clients of a server, without retries."""
    clients: list[openai.OpenAI] = []

    def connect(server: FakeServer, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0} | options
        client = openai.OpenAI(base_url=f"{server.url}/v1", **options)
        clients.append(client)
        return client

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def client(server, connect) -> openai.OpenAI:
    return connect(server)
