"""Files and Batches in a server: the routes on its application, the processor in its lifespan."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from conserve_sgl.batch.schema import EMBEDDINGS, ENDPOINTS
from conserve_sgl.batch.server.processor import BatchProcessor
from conserve_sgl.batch.server.routes import add_batch_routes
from conserve_sgl.batch.server.storage import Storage
from conserve_sgl.batch.server.store import Store
from conserve_sgl.client.clock import Clock
from conserve_sgl.config import BatchConfig
from conserve_sgl.status.record import BatchLine

__all__ = ["BatchServer"]

_MOST_SHOWN = 20


class BatchServer:
    """Takes the storage folder and puts itself into an application that has not started.

    Args:
        app: a FastAPI application; gets nine routes and a longer lifespan.
        config: `batch` of the configuration, with a `storage_dir`.
        api_key: what the application asks its clients for, or None.
        is_draining: whether the server has been told to stop.
        serves_embeddings: whether the model embeds texts or generates them; None for both.

    Raises:
        StorageError: the folder cannot be used, or another server uses it.
    """

    def __init__(
        self,
        app: Any,
        config: BatchConfig,
        *,
        api_key: str | None = None,
        is_draining: Callable[[], bool] = lambda: False,
        serves_embeddings: bool | None = None,
        clock: Clock | None = None,
    ) -> None:
        assert config.storage_dir is not None
        self._app = app
        self._config = config
        self._api_key = api_key
        self._is_draining = is_draining
        self._clock = clock or Clock()
        self._storage = Storage(Path(config.storage_dir))
        self._store: Store | None = None
        self._processor: BatchProcessor | None = None
        self._lifespan = app.router.lifespan_context
        endpoints = [e for e in ENDPOINTS if serves_embeddings in (None, e == EMBEDDINGS)]
        add_batch_routes(app, self._get_store, self._get_processor, config, endpoints, self._clock)
        app.router.lifespan_context = self._lifespan_with_ours

    @asynccontextmanager
    async def _lifespan_with_ours(self, app: Any) -> AsyncIterator[Any]:
        async with self._lifespan(app) as state:
            self._store = await Store.open(self._storage)
            try:
                self._processor = BatchProcessor(
                    self._store,
                    self._app,
                    self._config,
                    api_key=self._api_key,
                    is_draining=self._is_draining,
                    clock=self._clock,
                )
                await self._processor.start()
                yield state
            finally:
                if self._processor is not None:
                    await self._processor.stop()
                await self._store.close()
                self._storage.release()

    def leave(self) -> None:
        """The server was told to stop; see `BatchProcessor.leave`."""
        if self._processor is not None:
            self._processor.leave()

    def hold(self, held: bool) -> None:
        """Hold the batches, or send them; see `BatchProcessor.hold`."""
        if self._processor is not None:
            self._processor.hold(held)

    async def open_batches(self) -> list[BatchLine]:
        """The batches that have not ended, oldest first, as they are now; at most 20."""
        records = await self._get_store().active_batches()
        shown = map(self._get_processor().shown, records[:_MOST_SHOWN])
        return [
            BatchLine(
                id=batch.id,
                status=batch.status,
                total=batch.request_counts.total,
                completed=batch.request_counts.completed,
                failed=batch.request_counts.failed,
                created_at_s=batch.created_at,
                expires_at_s=batch.expires_at,
            )
            for batch in shown
        ]

    def _get_store(self) -> Store:
        assert self._store is not None, "a route was called before the application started"
        return self._store

    def _get_processor(self) -> BatchProcessor:
        assert self._processor is not None, "a route was called before the application started"
        return self._processor
