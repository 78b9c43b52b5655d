"""Sends the lines of the open batches, so many at a time, and stores what comes back.

A line goes to this server's own application, or where the batch has a client, to the servers of
that. Only what this process has in hand is marked: another one's death is not the batch's.

`max_in_flight` slots serve all batches, and `share.next_batch` says whose turn it is. A line keeps
its slot until its result is on disk: while the server's queue is full (429) or the disk is, lines
wait in their slots and nothing more is sent.

A line that was in flight when a server died is sent alone: once nothing else of any batch is in
flight, and nothing else is sent until it is done. Should the server die again, it was this line, or
none of any batch. All of them go first, so the time in which lines go one by one comes once.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from conserve_sgl.batch.answers import fault_of
from conserve_sgl.batch.ask import ask, failure
from conserve_sgl.batch.schema import ResultLine, failed_line, new_request_id, result_line
from conserve_sgl.batch.server.disk import Disk, Left
from conserve_sgl.batch.server.dispatch import Aborted, Application, Reply, post
from conserve_sgl.batch.server.marks import Marks
from conserve_sgl.batch.server.open_batch import OpenBatch
from conserve_sgl.batch.server.share import next_batch
from conserve_sgl.batch.server.store import Line
from conserve_sgl.batch.validate import RequestLine, read_request
from conserve_sgl.client.bounds import MOST_S
from conserve_sgl.client.clock import Clock, first_of
from conserve_sgl.client.endpoints import Endpoint
from conserve_sgl.client.headers import deadline_header, offline_headers
from conserve_sgl.client.http import Client, LineFailed
from conserve_sgl.client.interrupt import Stopped
from conserve_sgl.client.retry import Attempts, Passing, Retry, RetryRule

__all__ = ["RETRY", "Sender"]

RETRY = Retry(max_attempts=3, server_down_s=MOST_S)
"""A window bounds how long a busy server is waited for; nobody sets the rest."""
_RATE_WINDOW_S = 60.0


class Sender:
    """The slots, and the open batches that share them.

    Args:
        app: the ASGI application that the lines are sent to.
        headers: sent with every line.
        marks: are told of every line that goes to the application.
        disk: keeps the results.
    """

    def __init__(
        self,
        app: Application,
        headers: dict[str, str],
        max_in_flight: int,
        *,
        marks: Marks,
        disk: Disk,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._app = app
        self._headers = headers
        self._slots = asyncio.Semaphore(max_in_flight)
        self._marks = marks
        self._disk = disk
        self._released = asyncio.Event()
        self._released.set()
        self._alone: asyncio.Task[None] | None = None
        self._clock = clock
        self._rule = RetryRule(RETRY, clock=clock, rng=rng)
        self._batches: dict[str, OpenBatch] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._finished: deque[float] = deque()

    def add(self, batch: OpenBatch) -> None:
        """Send from `batch` too, until it is settled."""
        self._batches[batch.batch_id] = batch
        self._wake.set()

    def remove(self, batch: OpenBatch) -> None:
        """Forget a batch that is settled."""
        del self._batches[batch.batch_id]

    def hold(self, held: bool) -> None:
        """Send nothing more while held; what is in flight goes on."""
        if held:
            self._released.clear()
        else:
            self._released.set()
        self._wake.set()

    async def feed(self) -> None:
        """Fill the slots, for ever."""
        while True:
            await self._slots.acquire()
            batch = await self._turn()
            is_alone = batch.sends_alone
            task = asyncio.create_task(self._line(batch, *batch.take(), alone=is_alone))
            self._alone = task if is_alone else None
            self._tasks.add(task)
            task.add_done_callback(self._done)
            await asyncio.sleep(0)  # online requests share this loop

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._wake.set()  # a line may wait for this, to be alone

    async def _turn(self) -> OpenBatch:
        while True:
            ready = self._ready()
            if ready:
                claims = [batch.claim() for batch in ready]
                return ready[next_batch(claims, self._rate(), self._clock.wall_s())]
            self._wake.clear()
            await self._wake.wait()

    def _ready(self) -> list[OpenBatch]:
        """The batches that may send now."""
        if not self._released.is_set() or (self._alone in self._tasks):
            return []
        ready = [batch for batch in self._batches.values() if batch.can_send]
        alone = [batch for batch in ready if batch.sends_alone]
        if alone:
            return [] if self._tasks else alone
        return ready

    async def _line(self, batch: OpenBatch, offset: int, length: int, *, alone: bool) -> None:
        try:
            request = await self._disk.run(read_request, batch.source, offset, length)
            if batch.client is None or alone:  # what may end a server ends no other one
                line = await self._ask(batch, request)
            else:
                line = await self._ask_fleet(batch, batch.client, request)
            await self._write(batch, line)
            self._finished.append(self._clock.monotonic_s())
        except (Aborted, Left, Stopped):
            pass
        except Exception as e:
            batch.break_off(e)
        finally:
            self._slots.release()
            batch.give_back()

    async def _ask(self, batch: OpenBatch, request: RequestLine) -> ResultLine:
        attempts = Attempts()
        while True:
            reply = await self._post(batch, request)
            why = Passing.of(reply.status)
            fault = fault_of(reply.body) if reply.status == 200 else None
            if fault:
                if batch.abort.is_set():
                    raise Aborted  # by us
                why = Passing.LOST
            wait_s = None
            if why is not None:
                wait_s = self._rule.wait_s(why, attempts, reply.headers.get("retry-after"))
            if wait_s is None:
                return _result(request, reply, fault, attempts)
            await first_of(self._clock.sleep(wait_s), batch.abort.wait())
            if batch.abort.is_set():
                raise Aborted

    async def _post(self, batch: OpenBatch, request: RequestLine) -> Reply:
        headers = self._headers | offline_headers(batch.batch_id)
        headers |= deadline_header(batch.deadline_s - self._clock.wall_s())
        async with self._marked(Line(batch.batch_id, request.custom_id)):
            return await post(self._app, request.url, headers, bytes(request.body), batch.abort)

    async def _ask_fleet(
        self, batch: OpenBatch, client: Client, request: RequestLine
    ) -> ResultLine:
        sending = partial(self._sending, batch, Line(batch.batch_id, request.custom_id))
        asking = asyncio.create_task(ask(client, request, sending=sending))
        await first_of(asking, batch.abort.wait())
        await asyncio.wait((asking,))
        if asking.cancelled():
            raise Aborted
        try:
            return asking.result()
        except LineFailed as e:
            return failure(request.custom_id, e)

    @asynccontextmanager
    async def _sending(
        self, batch: OpenBatch, line: Line, endpoint: Endpoint
    ) -> AsyncIterator[None]:
        """What a line is sent within that is going to `endpoint`."""
        if not self._released.is_set():
            await first_of(self._released.wait(), batch.ended.wait())
        if batch.ended.is_set():
            raise Stopped
        if not endpoint.is_own:
            yield
            return
        async with self._marked(line):
            yield

    @asynccontextmanager
    async def _marked(self, line: Line) -> AsyncIterator[None]:
        try:
            await self._disk.patiently(f"{line.batch_id}: a line", self._marks.begin, line)
            yield
        finally:
            self._marks.end(line)

    async def _write(self, batch: OpenBatch, line: ResultLine) -> None:
        async def write() -> None:
            async with batch.writing:
                await self._disk.run(batch.results.add, line)

        await self._disk.patiently(f"{batch.batch_id}: a result", write)

    def _rate(self) -> float:
        """Lines finished a second, over the last minute."""
        oldest_s = self._clock.monotonic_s() - _RATE_WINDOW_S
        while self._finished and self._finished[0] < oldest_s:
            self._finished.popleft()
        return len(self._finished) / _RATE_WINDOW_S


def _result(
    request: RequestLine, reply: Reply, fault: str | None, attempts: Attempts
) -> ResultLine:
    if fault:
        what = f"{fault} (tried {attempts.lost} times)"
        return failed_line(request.custom_id, "aborted", what)
    request_id = reply.headers.get("x-request-id") or new_request_id()
    return result_line(request.custom_id, reply.status, reply.body, request_id)
