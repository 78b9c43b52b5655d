"""The batches of one server: what goes on with each, and what is done for all of them.

`lifecycle.py` takes each through its states, `sender.py` sends their lines. Here they begin, are
cancelled, held and left, and every second their results are made safe.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from conserve_sgl.batch.schema import Batch, BatchRecord
from conserve_sgl.batch.server.batch_files import BatchFiles
from conserve_sgl.batch.server.disk import Disk, Left
from conserve_sgl.batch.server.dispatch import Application
from conserve_sgl.batch.server.fleet import Fleet
from conserve_sgl.batch.server.lifecycle import DRAIN_S, ActiveBatch, Lifecycle
from conserve_sgl.batch.server.marks import Marks
from conserve_sgl.batch.server.open_batch import Ending
from conserve_sgl.batch.server.sender import RETRY, Sender
from conserve_sgl.batch.server.store import Store
from conserve_sgl.client.clock import Clock
from conserve_sgl.client.headers import key_header
from conserve_sgl.config import BatchConfig
from conserve_sgl.errors import ConserveError, StorageError

__all__ = ["BatchProcessor", "NotCancellable"]

logger = logging.getLogger(__name__)

MAX_NAMED = 20
TICK_S = 1.0
SAVE_S = 5.0
PURGE_S = 60.0


class NotCancellable(ConserveError):
    """The batch is over, or about to be."""


class BatchProcessor:
    """Runs every active batch of a store.

    Args:
        store: open; from now on only this changes batches in it.
        app: the ASGI application that the lines are sent to.
        config: `batch` of the server's configuration.
        api_key: what the application asks its clients for, or None.
        is_draining: whether the server has been told to stop.
    """

    def __init__(
        self,
        store: Store,
        app: Application,
        config: BatchConfig,
        *,
        api_key: str | None = None,
        is_draining: Callable[[], bool] = lambda: False,
        clock: Clock | None = None,
        seed: int | None = None,
    ) -> None:
        self._store = store
        self._retention_s = int(config.retention_hours * 3600)
        self._max_deaths = config.max_deaths
        self._is_draining = is_draining
        self._clock = clock or Clock()
        self._batches: dict[str, ActiveBatch] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._services: list[asyncio.Task[None]] = []
        self._leaving = asyncio.Event()
        self._disk = Disk(self._leaving, self._clock)
        self._files = BatchFiles(store, config)
        self._marks = Marks(store)
        rng = random.Random(seed)
        self._sender = Sender(
            app,
            key_header(api_key),
            config.max_in_flight,
            marks=self._marks,
            disk=self._disk,
            clock=self._clock,
            rng=rng,
        )
        self._lifecycle = Lifecycle(
            store,
            self._sender,
            Fleet(config, RETRY, api_key=api_key, clock=self._clock, rng=rng),
            self._files,
            self._disk,
            leaving=self._leaving,
            clock=self._clock,
        )
        if config.start == "held":
            self.hold(True)

    async def start(self) -> None:
        """Go on with every batch that is not over."""
        if lines := await self._store.count_deaths():
            names = [f"{line.custom_id!r} of {line.batch_id}" for line in lines[:MAX_NAMED]]
            logger.warning(
                "the last server died with %d lines of batches in flight, which are sent one at a "
                "time now, and not again after %d deaths: %s%s",
                len(lines),
                self._max_deaths,
                ", ".join(names),
                ", ..." if len(lines) > MAX_NAMED else "",
            )
        for record in await self._store.active_batches():
            self.submit(await self._disk.run(self._files.recounted, record))
        for service in (self._sender.feed(), self._tick(), self._purge()):
            self._services.append(asyncio.create_task(_loudly(service)))

    async def stop(self) -> None:
        """Give up what is in flight; the store then holds all that the next start needs."""
        self._leave()
        self._abort_all()
        for service in self._services:
            service.cancel()
        await self._close_marks()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._disk.close()

    def leave(self) -> None:
        """The server was told to stop: send nothing more, and give up after 10 s what is in
        flight. The lines that are will be sent again, and the stop is no death of theirs."""
        if self._leaving.is_set():
            return
        logger.info("the server stops: batches send nothing more")
        self._leave()
        for service in (self._close_marks(), self._abort_later()):
            self._services.append(asyncio.create_task(_loudly(service)))

    def hold(self, held: bool) -> None:
        """Send nothing of any batch while held; what is in flight goes on."""
        logger.info("batches %s", "are held: nothing of them is sent" if held else "are sent")
        self._sender.hold(held)

    def submit(self, record: BatchRecord) -> None:
        """Run a batch that is in the store; one that runs already goes on."""
        if record.batch.id in self._batches:
            return
        active = self._batches[record.batch.id] = ActiveBatch(record)
        task = asyncio.create_task(self._drive(active))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def shown(self, record: BatchRecord) -> Batch:
        """The batch as it is right now."""
        active = self._batches.get(record.batch.id)
        return (record if active is None else active.counted()).batch

    async def cancel(self, record: BatchRecord) -> Batch:
        """Begin to cancel a batch; one that is cancelled already stays as it is.

        Raises:
            NotCancellable: it is too late.
            StorageError: the store did not take it; nothing has changed.
        """
        active = self._batches.get(record.batch.id)
        if active is not None:
            async with active.lock:
                if active.status in ("validating", "in_progress"):
                    changes = {"status": "cancelling", "cancelling_at": self._now()}
                    changed = active.counted().with_batch(**changes)
                    await self._store.update_batch(changed)
                    active.record = changed
                    active.cancelled.set()
                record = active.record
        if record.batch.status not in ("cancelling", "cancelled"):
            raise NotCancellable(f"a batch that is {record.batch.status} cannot be cancelled")
        return record.batch

    async def _drive(self, active: ActiveBatch) -> None:
        try:
            await self._lifecycle.run(active)
        except Left:
            logger.info("%s is left %s, to be gone on with", active.id, active.status)
        finally:
            del self._batches[active.id]

    # ------------------------------------------------------------- services

    async def _tick(self) -> None:
        saved_s = self._clock.monotonic_s()
        while True:
            await self._clock.sleep(TICK_S)
            if self._is_draining():
                self.leave()
            await self._write_marks()
            is_time = self._clock.monotonic_s() - saved_s >= SAVE_S
            if is_time:
                saved_s = self._clock.monotonic_s()
            for active in list(self._batches.values()):
                await self._secure(active, save=is_time)

    async def _secure(self, active: ActiveBatch, *, save: bool) -> None:
        """Sync the results of an open batch, and now and then save its counts."""
        opened = active.opened
        if opened is None:
            return
        try:
            async with opened.writing:
                if active.opened is opened:
                    await self._disk.run(opened.results.sync)
            async with active.lock:
                if save and active.opened is opened and active.counted() != active.record:
                    active.record = active.counted()
                    await self._store.update_batch(active.record)
        except (StorageError, OSError) as e:
            logger.error("%s: %s", active.id, e)

    async def _write_marks(self) -> None:
        try:
            await self._marks.write()
        except StorageError as e:
            logger.error("lines stay marked as in flight: %s", e)

    async def _close_marks(self) -> None:
        try:
            await self._marks.close()
        except StorageError as e:
            logger.error("this stop will count as a death to the lines in flight: %s", e)

    async def _purge(self) -> None:
        while True:
            now = self._now()
            try:
                await self._store.purge(now, now - self._retention_s)
            except StorageError as e:
                logger.error("expired files stay: %s", e)
            await self._clock.sleep(PURGE_S)

    def _now(self) -> int:
        return int(self._clock.wall_s())

    def _leave(self) -> None:
        self._leaving.set()
        for active in self._batches.values():
            if active.opened is not None:
                active.opened.end(Ending.LEFT)

    async def _abort_later(self) -> None:
        await self._clock.sleep(DRAIN_S)
        self._abort_all()

    def _abort_all(self) -> None:
        for active in self._batches.values():
            if active.opened is not None:
                active.opened.abort.set()


async def _loudly(service: Coroutine[Any, Any, None]) -> None:
    try:
        await service
    except Exception:
        logger.critical("batches have stopped; restart the server", exc_info=True)
        raise
