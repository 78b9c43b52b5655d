"""What a batch goes through in a server: from `validating` to the end, over restarts.

    validating --+--> failed                                        the input is refused
                 +--> in_progress --+--> finalizing --> completed   every line is done
                                    +--> finalizing --> expired     the window has ended
                                    +--> failed                     the input can be read no more
    validating, in_progress --> cancelling --> cancelled

A state is in the store before anything is done in it, and all that is done in a state may be done
again, so a restart goes on from whatever state it finds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from conserve_sgl.batch.schema import (
    BatchError,
    BatchErrors,
    BatchRecord,
    RequestCounts,
    Usage,
)
from conserve_sgl.batch.server.batch_files import BatchFiles
from conserve_sgl.batch.server.disk import Disk, Left
from conserve_sgl.batch.server.fleet import Fleet
from conserve_sgl.batch.server.open_batch import Ending, OpenBatch
from conserve_sgl.batch.server.sender import Sender
from conserve_sgl.batch.server.store import Store
from conserve_sgl.batch.validate import InputRefused, Plan
from conserve_sgl.client.clock import Clock, first_of

__all__ = ["DRAIN_S", "ActiveBatch", "Lifecycle"]

logger = logging.getLogger(__name__)

DRAIN_S = 10.0
"""How long a cancelled batch, and a server that stops, wait for what is in flight."""
MAX_OPEN = 16
"""Batches that are sent from at a time; each keeps a few MB in memory."""
BREATH_S = 0.01
NAP_S = 60.0


class _Cancelled(Exception):
    """The batch was cancelled while its input was read."""


class ActiveBatch:
    """A batch that is not over. Its record changes only under `lock`.

    `opened` is it while it is sent from, and None before and after.
    """

    def __init__(self, record: BatchRecord) -> None:
        self.record = record
        self.lock = asyncio.Lock()
        self.opened: OpenBatch | None = None
        self.cancelled = asyncio.Event()
        if self.status == "cancelling":
            self.cancelled.set()

    @property
    def id(self) -> str:
        return self.record.batch.id

    @property
    def status(self) -> str:
        return self.record.batch.status

    def counted(self) -> BatchRecord:
        """The record with the counts of right now."""
        if self.opened is None:
            return self.record
        results = self.opened.results
        return self.record.with_batch(request_counts=results.counts, usage=results.usage)


class Lifecycle:
    """Takes active batches through their states.

    Args:
        store: only this and the processor change batches in it.
        sender: sends the lines of those that are in progress.
        fleet: where they go.
        leaving: once it is set, every batch is left in the state that it has.
    """

    def __init__(
        self,
        store: Store,
        sender: Sender,
        fleet: Fleet,
        files: BatchFiles,
        disk: Disk,
        *,
        leaving: asyncio.Event,
        clock: Clock,
    ) -> None:
        self._store = store
        self._sender = sender
        self._fleet = fleet
        self._disk = disk
        self._files = files
        self._leaving = leaving
        self._clock = clock
        self._open = asyncio.Semaphore(MAX_OPEN)
        self._scanning = asyncio.Lock()

    async def run(self, active: ActiveBatch) -> None:
        """From the state that it has to its end.

        Raises:
            Left: the server stops before that.
        """
        try:
            if active.status == "validating":
                await self._validate(active)
            if active.status == "in_progress":
                await self._send(active)
            if active.status == "finalizing":
                await self._end(active, active.record.ending or "completed")
            if active.status == "cancelling":
                await self._end(active, "cancelled")
        except Left:
            raise
        except Exception as e:
            logger.exception("%s failed", active.id)
            error = BatchError(code="internal_error", message=f"{type(e).__name__}: {e}")
            await self._end(active, "failed", [error])

    async def _validate(self, active: ActiveBatch) -> None:
        try:
            plan = await self._scan(active)
        except _Cancelled:
            return
        except InputRefused as e:
            await self._end(active, "failed", e.errors)
        except OSError as e:
            await self._end(active, "failed", [_unreadable(e)])
        else:
            await self._change(
                active,
                status="in_progress",
                in_progress_at=self._now(),
                model=plan.model,
                request_counts=RequestCounts(total=plan.total),
                usage=Usage(),
            )

    async def _send(self, active: ActiveBatch) -> None:
        async with self._turn(active):
            try:
                opened = await self._open_batch(active)
            except _Cancelled:
                return
            except (InputRefused, OSError) as e:
                await self._end(active, "failed", [_unreadable(e)])
                return
            try:
                active.opened = opened
                async with self._fleet.reached_from(opened):
                    await self._settle(active, opened)
                await self._disk.patiently(active.id, self._disk.run, opened.results.sync)
            finally:
                await self._close_batch(active, opened)
        if opened.ending is Ending.BROKEN:
            if not isinstance(opened.fault, OSError):
                raise opened.fault
            await self._end(active, "failed", [_unreadable(opened.fault)])
        elif opened.ending in (Ending.COMPLETED, Ending.EXPIRED):
            ending, now = opened.ending.value, self._now()
            await self._change(active, ending=ending, status="finalizing", finalizing_at=now)
        elif opened.ending is Ending.LEFT:
            raise Left

    async def _settle(self, active: ActiveBatch, opened: OpenBatch) -> None:
        """Send from it until nothing is in flight and nothing more will be."""
        if self._leaving.is_set():
            opened.end(Ending.LEFT)
        if self._clock.wall_s() >= opened.deadline_s:
            opened.end(Ending.EXPIRED)
        self._sender.add(opened)
        try:
            await first_of(opened.settled.wait(), active.cancelled.wait(), self._deadline(active))
            if active.cancelled.is_set():
                opened.end(Ending.CANCELLED)
                await first_of(opened.settled.wait(), self._clock.sleep(DRAIN_S))
            elif not opened.settled.is_set():
                opened.end(Ending.EXPIRED)
            opened.abort.set()
            await opened.settled.wait()
        finally:
            self._sender.remove(opened)

    async def _end(
        self, active: ActiveBatch, status: str, errors: list[BatchError] | None = None
    ) -> None:
        """The last state: complete the result files, and show them."""
        disk, files = self._disk, self._files
        counts, usage = await disk.patiently(active.id, disk.run, files.collect, active.record)
        now = self._now()
        shown = await disk.run(files.shown, active.record, now)
        shown_ids = {file.id for file in shown}
        output_id, error_id = active.record.output_id, active.record.error_id
        async with active.lock:
            record = active.record.with_batch(
                status=status,
                errors=BatchErrors(data=errors) if errors else None,
                output_file_id=output_id if output_id in shown_ids else None,
                error_file_id=error_id if error_id in shown_ids else None,
                request_counts=counts,
                usage=None if active.record.batch.usage is None else usage,
                **{f"{status}_at": now},
            )
            await disk.patiently(active.id, self._store.end_batch, record, now, shown)
            active.record = record
        logger.info("%s is %s: %s", active.id, status, counts)

    # ---------------------------------------------------------------- steps

    async def _change(
        self, active: ActiveBatch, *, ending: str | None = None, **changes: Any
    ) -> None:
        """Enter another state, unless the batch is being cancelled."""
        async with active.lock:
            if active.status == "cancelling":
                return
            record = msgspec.structs.replace(active.record, ending=ending).with_batch(**changes)
            await self._disk.patiently(active.id, self._store.update_batch, record)
            active.record = record

    @asynccontextmanager
    async def _turn(self, active: ActiveBatch) -> AsyncIterator[None]:
        """A place among the open batches; a batch that will send nothing needs none."""
        place = asyncio.ensure_future(self._open.acquire())
        await first_of(place, self._deadline(active), active.cancelled.wait(), self._leaving.wait())
        has_place = place.done() and not place.cancelled()
        try:
            yield
        finally:
            if has_place:
                self._open.release()

    async def _open_batch(self, active: ActiveBatch) -> OpenBatch:
        disk, files = self._disk, self._files
        results = await disk.patiently(active.id, disk.run, files.results, active.record)
        try:
            deaths = await disk.patiently(active.id, self._store.deaths, active.id)
            await disk.patiently(active.id, disk.run, files.give_up, results, deaths)
            plan = await self._scan(active, results.done, deaths)
            source = await disk.run(os.open, files.input(active.record), os.O_RDONLY)
        except BaseException:
            await disk.run(results.close)
            raise
        return OpenBatch(active.id, active.record.batch.expires_at, plan, results, source)

    async def _close_batch(self, active: ActiveBatch, opened: OpenBatch) -> None:
        async with opened.writing:
            active.record = active.counted()
            active.opened = None
            os.close(opened.source)
            try:
                await self._disk.run(opened.results.close)
            except OSError as e:  # what is missing is seen when they are opened again
                logger.error("%s: %s", active.id, e)

    async def _scan(
        self, active: ActiveBatch, done: Collection[str] = (), apart: Collection[str] = ()
    ) -> Plan:
        def breathe() -> None:
            time.sleep(BREATH_S)  # lets online requests have the interpreter
            if self._leaving.is_set():
                raise Left
            if active.cancelled.is_set():
                raise _Cancelled

        async with self._scanning:  # one at a time: it is work for the processor
            return await self._disk.run(self._files.plan, active.record, done, apart, breathe)

    async def _deadline(self, active: ActiveBatch) -> None:
        # In short naps, because the wall clock may be set meanwhile.
        while (left_s := active.record.batch.expires_at - self._clock.wall_s()) > 0:
            await self._clock.sleep(min(left_s, NAP_S))

    def _now(self) -> int:
        return int(self._clock.wall_s())


def _unreadable(e: Exception | None) -> BatchError:
    return BatchError(code="unreadable_file", message=f"the input file cannot be read: {e}")
