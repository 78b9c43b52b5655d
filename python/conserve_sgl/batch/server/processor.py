"""Runs the batches of a server: from `validating` to the end, over restarts.

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
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from conserve_sgl.batch.results import Results, finished_lines
from conserve_sgl.batch.schema import (
    Batch,
    BatchError,
    BatchErrors,
    BatchRecord,
    FileObject,
    RequestCounts,
    Usage,
    failed_line,
)
from conserve_sgl.batch.server.dispatch import Application
from conserve_sgl.batch.server.marks import InFlight
from conserve_sgl.batch.server.sender import DISK_RETRY_S, Ending, Run, Sender
from conserve_sgl.batch.server.store import Store
from conserve_sgl.batch.validate import InputRefused, Limits, Plan, read_plan, read_request
from conserve_sgl.client.http import Clock, first_of
from conserve_sgl.config import BatchConfig
from conserve_sgl.errors import ConserveError, JobError, StorageError

__all__ = ["NotCancellable", "Runner"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

DRAIN_S = 10.0
"""How long a cancelled batch, and a server that stops, wait for what is in flight."""
MAX_OPEN = 16
"""Batches that are sent from at a time; each keeps a few MB in memory."""
MAX_NAMED = 20
TICK_S = 1.0
SAVE_S = 5.0
PURGE_S = 60.0
BREATH_S = 0.01
NAP_S = 60.0
_EXPIRED = "This request could not be executed before the completion window expired."


class NotCancellable(ConserveError):
    """The batch is over, or about to be."""


class _Left(Exception):
    """The server stops; the next one goes on."""


class _Cancelled(Exception):
    """The batch was cancelled while its input was read."""


class _Job:
    """An active batch. Its record changes only under `lock`."""

    def __init__(self, record: BatchRecord) -> None:
        self.record = record
        self.lock = asyncio.Lock()
        self.run: Run | None = None
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
        if self.run is None:
            return self.record
        results = self.run.results
        return self.record.with_batch(request_counts=results.counts, usage=results.usage)


class Runner:
    """Runs every active batch of a store.

    Args:
        store: open; from now on only the runner changes batches in it.
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
        self._limits = Limits(max_requests=config.max_requests)
        self._max_deaths = config.max_deaths
        self._is_draining = is_draining
        self._clock = clock or Clock()
        self._jobs: dict[str, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._services: list[asyncio.Task[None]] = []
        self._open = asyncio.Semaphore(MAX_OPEN)
        self._scanning = asyncio.Lock()
        self._leaving = asyncio.Event()
        # Our own threads: a slow disk must not keep SGLang's from tokenizing.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="conserve-batch")
        self._in_flight = InFlight(store)
        self._sender = Sender(
            app,
            {"authorization": f"Bearer {api_key}"} if api_key else {},
            config.max_in_flight,
            in_flight=self._in_flight,
            threads=self._threads,
            leaving=self._leaving,
            clock=self._clock,
            rng=random.Random(seed),
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
            self.submit(await self._in_thread(self._recounted, record))
        for service in (self._sender.feed(), self._tick(), self._purge()):
            self._services.append(asyncio.create_task(_loudly(service)))

    def _recounted(self, record: BatchRecord) -> BatchRecord:
        """With the counts of its result files: those in the store are of some seconds before the
        last server ended, and the files are opened only when the batch has its turn."""
        if record.batch.status == "validating":
            return record
        try:
            completed, failed = (
                finished_lines(self._store.content(i)) for i in (record.output_id, record.error_id)
            )
        except OSError as e:  # it will be met again where it matters
            logger.error("%s: its lines cannot be counted: %s", record.batch.id, e)
            return record
        total = record.batch.request_counts.total
        counts = RequestCounts(total=total, completed=completed, failed=failed)
        return record.with_batch(request_counts=counts)

    async def stop(self) -> None:
        """Give up what is in flight; the store then holds all that the next start needs."""
        self._leave()
        self._abort_all()
        for service in self._services:
            service.cancel()
        await self._close_marks()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._threads.shutdown()

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
        if record.batch.id in self._jobs:
            return
        job = self._jobs[record.batch.id] = _Job(record)
        task = asyncio.create_task(self._drive(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def shown(self, record: BatchRecord) -> Batch:
        """The batch as it is right now."""
        job = self._jobs.get(record.batch.id)
        return (record if job is None else job.counted()).batch

    async def cancel(self, record: BatchRecord) -> Batch:
        """Begin to cancel a batch; one that is cancelled already stays as it is.

        Raises:
            NotCancellable: it is too late.
            StorageError: the store did not take it; nothing has changed.
        """
        job = self._jobs.get(record.batch.id)
        if job is not None:
            async with job.lock:
                if job.status in ("validating", "in_progress"):
                    changes = {"status": "cancelling", "cancelling_at": self._now()}
                    changed = job.counted().with_batch(**changes)
                    await self._store.update_batch(changed)
                    job.record = changed
                    job.cancelled.set()
                record = job.record
        if record.batch.status not in ("cancelling", "cancelled"):
            raise NotCancellable(f"a batch that is {record.batch.status} cannot be cancelled")
        return record.batch

    # --------------------------------------------------------------- states

    async def _drive(self, job: _Job) -> None:
        try:
            await self._run(job)
        except _Left:
            logger.info("%s is left %s, to be gone on with", job.id, job.status)
        finally:
            del self._jobs[job.id]

    async def _run(self, job: _Job) -> None:
        try:
            if job.status == "validating":
                await self._validate(job)
            if job.status == "in_progress":
                await self._send(job)
            if job.status == "finalizing":
                await self._end(job, job.record.ending or "completed")
            if job.status == "cancelling":
                await self._end(job, "cancelled")
        except _Left:
            raise
        except Exception as e:
            logger.exception("%s failed", job.id)
            error = BatchError(code="internal_error", message=f"{type(e).__name__}: {e}")
            await self._end(job, "failed", [error])

    async def _validate(self, job: _Job) -> None:
        try:
            plan = await self._scan(job)
        except _Cancelled:
            return
        except InputRefused as e:
            await self._end(job, "failed", e.errors)
        except OSError as e:
            await self._end(job, "failed", [_unreadable(e)])
        else:
            await self._change(
                job,
                status="in_progress",
                in_progress_at=self._now(),
                model=plan.model,
                request_counts=RequestCounts(total=plan.total),
                usage=Usage(),
            )

    async def _send(self, job: _Job) -> None:
        async with self._turn(job):
            try:
                run = await self._open_run(job)
            except _Cancelled:
                return
            except (InputRefused, OSError) as e:
                await self._end(job, "failed", [_unreadable(e)])
                return
            try:
                job.run = run
                await self._settle(job, run)
                await self._patiently(self._in_thread, run.results.sync)
            finally:
                await self._close_run(job, run)
        if run.ending is Ending.BROKEN:
            if not isinstance(run.fault, OSError):
                raise run.fault
            await self._end(job, "failed", [_unreadable(run.fault)])
        elif run.ending in (Ending.COMPLETED, Ending.EXPIRED):
            ending = run.ending.value
            await self._change(job, ending=ending, status="finalizing", finalizing_at=self._now())
        elif run.ending is Ending.LEFT:
            raise _Left

    async def _settle(self, job: _Job, run: Run) -> None:
        """Send from it until nothing is in flight and nothing more will be."""
        if self._leaving.is_set():
            run.end(Ending.LEFT)
        if self._clock.wall_s() >= run.deadline_s:
            run.end(Ending.EXPIRED)
        self._sender.add(run)
        try:
            await first_of(run.settled.wait(), job.cancelled.wait(), self._deadline(job))
            if job.cancelled.is_set():
                run.end(Ending.CANCELLED)
                await first_of(run.settled.wait(), self._clock.sleep(DRAIN_S))
            elif not run.settled.is_set():
                run.end(Ending.EXPIRED)
            run.abort.set()
            await run.settled.wait()
        finally:
            self._sender.remove(run)

    async def _end(self, job: _Job, status: str, errors: list[BatchError] | None = None) -> None:
        """The last state: complete the result files, and show them."""
        counts, usage = await self._patiently(self._in_thread, self._collect, job)
        now = self._now()
        files = await self._in_thread(self._result_files, job, now)
        shown = {file.id for file in files}
        output_id, error_id = job.record.output_id, job.record.error_id
        async with job.lock:
            record = job.record.with_batch(
                status=status,
                errors=BatchErrors(data=errors) if errors else None,
                output_file_id=output_id if output_id in shown else None,
                error_file_id=error_id if error_id in shown else None,
                request_counts=counts,
                usage=None if job.record.batch.usage is None else usage,
                **{f"{status}_at": now},
            )
            await self._patiently(self._store.end_batch, record, now, files)
            job.record = record
        logger.info("%s is %s: %s", job.id, status, counts)

    def _collect(self, job: _Job) -> tuple[RequestCounts, Usage]:
        """Count the results, after an expired batch's missing lines were added, and sync them."""
        results = self._open_results(job)
        try:
            if job.record.ending == "expired":
                self._add_expired(job, results)
            results.sync()
        finally:
            results.close()
        return results.counts, results.usage

    def _add_expired(self, job: _Job, results: Results) -> None:
        try:
            plan = self._read_plan(job, results.done)
            with self._input(job).open("rb") as source:
                for where in plan:
                    line = read_request(source.fileno(), *where)
                    results.add(failed_line(line.custom_id, "batch_expired", _EXPIRED))
        except (InputRefused, OSError) as e:
            logger.error("%s: its expired lines cannot be told: %s", job.id, e)

    def _result_files(self, job: _Job, now: int) -> list[FileObject]:
        """The files that hold anything; the other one is removed."""
        files = []
        expires_at = now + (job.record.output_expires_s or self._retention_s)
        for file_id, what in ((job.record.output_id, "output"), (job.record.error_id, "error")):
            path = self._store.content(file_id)
            size_bytes = path.stat().st_size
            if size_bytes == 0:
                path.unlink()
                continue
            file = FileObject(
                id=file_id,
                bytes=size_bytes,
                created_at=now,
                filename=f"{job.id}_{what}.jsonl",
                purpose="batch_output",
                expires_at=expires_at,
            )
            files.append(file)
        return files

    # ---------------------------------------------------------------- steps

    async def _change(self, job: _Job, *, ending: str | None = None, **changes: Any) -> None:
        """Enter another state, unless the batch is being cancelled."""
        async with job.lock:
            if job.status == "cancelling":
                return
            record = msgspec.structs.replace(job.record, ending=ending).with_batch(**changes)
            await self._patiently(self._store.update_batch, record)
            job.record = record

    @asynccontextmanager
    async def _turn(self, job: _Job) -> AsyncIterator[None]:
        """A place among the open batches; a batch that will send nothing needs none."""
        place = asyncio.ensure_future(self._open.acquire())
        await first_of(place, self._deadline(job), job.cancelled.wait(), self._leaving.wait())
        has_place = place.done() and not place.cancelled()
        try:
            yield
        finally:
            if has_place:
                self._open.release()

    async def _open_run(self, job: _Job) -> Run:
        results = await self._patiently(self._in_thread, self._open_results, job)
        try:
            deaths = await self._patiently(self._store.deaths, job.id)
            await self._patiently(self._in_thread, self._give_up, results, deaths)
            plan = await self._scan(job, results.done, deaths)
            source = await self._in_thread(os.open, self._input(job), os.O_RDONLY)
        except BaseException:
            await self._in_thread(results.close)
            raise
        return Run(job.id, job.record.batch.expires_at, plan, results, source)

    def _give_up(self, results: Results, deaths: Mapping[str, int]) -> None:
        """The lines that were in flight at too many deaths have failed."""
        for custom_id, times in deaths.items():
            if times >= self._max_deaths and custom_id not in results.done:
                message = f"the server died {times} time{'s'[: times > 1]} while it ran"
                results.add(failed_line(custom_id, "server_died", message))

    async def _close_run(self, job: _Job, run: Run) -> None:
        async with run.writing:
            job.record = job.counted()
            job.run = None
            os.close(run.source)
            try:
                await self._in_thread(run.results.close)
            except OSError as e:  # what is missing is seen when they are opened again
                logger.error("%s: %s", job.id, e)

    def _open_results(self, job: _Job) -> Results:
        output, errors = (
            self._store.content(i) for i in (job.record.output_id, job.record.error_id)
        )
        return Results(output, errors, job.record.batch.request_counts.total)

    def _input(self, job: _Job) -> Path:
        return self._store.content(job.record.batch.input_file_id)

    async def _scan(
        self, job: _Job, done: Collection[str] = (), apart: Collection[str] = ()
    ) -> Plan:
        async with self._scanning:  # one at a time: it is work for the processor
            return await self._in_thread(self._read_plan, job, done, apart)

    def _read_plan(self, job: _Job, done: Collection[str], apart: Collection[str] = ()) -> Plan:
        def breathe() -> None:
            time.sleep(BREATH_S)  # lets online requests have the interpreter
            if self._leaving.is_set():
                raise _Left
            if job.cancelled.is_set():
                raise _Cancelled

        endpoint = job.record.batch.endpoint
        return read_plan(
            self._input(job), endpoint, self._limits, done=done, apart=apart, breathe=breathe
        )

    async def _deadline(self, job: _Job) -> None:
        # In short naps, because the wall clock may be set meanwhile.
        while (left_s := job.record.batch.expires_at - self._clock.wall_s()) > 0:
            await self._clock.sleep(min(left_s, NAP_S))

    async def _patiently(self, do: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Do it again until the disk takes it."""
        complained = False
        while True:
            try:
                return await do(*arguments)
            except (StorageError, JobError, OSError) as e:
                if not complained:
                    logger.error("batches wait for the disk: %s", e)
                complained = True
            await first_of(self._clock.sleep(DISK_RETRY_S), self._leaving.wait())
            if self._leaving.is_set():
                raise _Left

    async def _in_thread(self, do: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, do, *arguments)

    def _now(self) -> int:
        return int(self._clock.wall_s())

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
            for job in list(self._jobs.values()):
                await self._secure(job, save=is_time)

    async def _secure(self, job: _Job, *, save: bool) -> None:
        """Sync the results of an open batch, and now and then save its counts."""
        run = job.run
        if run is None:
            return
        try:
            async with run.writing:
                if job.run is run:
                    await self._in_thread(run.results.sync)
            async with job.lock:
                if save and job.run is run and job.counted() != job.record:
                    job.record = job.counted()
                    await self._store.update_batch(job.record)
        except (StorageError, OSError) as e:
            logger.error("%s: %s", job.id, e)

    async def _write_marks(self) -> None:
        try:
            await self._in_flight.write()
        except StorageError as e:
            logger.error("lines stay marked as in flight: %s", e)

    async def _close_marks(self) -> None:
        try:
            await self._in_flight.close()
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

    def _leave(self) -> None:
        self._leaving.set()
        for job in self._jobs.values():
            if job.run is not None:
                job.run.end(Ending.LEFT)

    async def _abort_later(self) -> None:
        await self._clock.sleep(DRAIN_S)
        self._abort_all()

    def _abort_all(self) -> None:
        for job in self._jobs.values():
            if job.run is not None:
                job.run.abort.set()


async def _loudly(service: Coroutine[Any, Any, None]) -> None:
    try:
        await service
    except Exception:
        logger.critical("batches have stopped; restart the server", exc_info=True)
        raise


def _unreadable(e: Exception | None) -> BatchError:
    return BatchError(code="unreadable_file", message=f"the input file cannot be read: {e}")
