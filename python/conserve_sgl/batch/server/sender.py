"""Sends the lines of the open batches, so many at a time, and stores what comes back.

`max_in_flight` slots serve all batches, and `share.next_batch` says whose turn it is. A line keeps
its slot until its result is on disk: while the server's queue is full (429) or the disk is, lines
wait in their slots and nothing more is sent.

A line that was in flight when a server died is sent alone: once nothing else of any batch is in
flight, and nothing else is sent until it is done. Should the server die again, it was this line, or
none of any batch. All of them go first, so the time in which lines go one by one comes once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from enum import Enum

import msgspec

from conserve_sgl.batch.answers import fault_of
from conserve_sgl.batch.results import Results
from conserve_sgl.batch.schema import LineResponse, ResultLine, failed_line, new_line_id
from conserve_sgl.batch.server.dispatch import Aborted, Application, Reply, post
from conserve_sgl.batch.server.marks import InFlight
from conserve_sgl.batch.server.share import Claim, next_batch
from conserve_sgl.batch.server.store import Line
from conserve_sgl.batch.validate import Plan, RequestLine, read_request
from conserve_sgl.client.http import Clock, backoff_s, first_of, retry_after_s
from conserve_sgl.errors import JobError, StorageError
from conserve_sgl.jobs.schema import Retry

__all__ = ["DISK_RETRY_S", "Ending", "Run", "Sender", "result_line"]

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""How often a line may meet 408, 500, 502, 504 or an answer that is none before it has failed."""
DISK_RETRY_S = 5.0
_RATE_WINDOW_S = 60.0
_BUSY = (429, 503)
_FLAKY = (408, 500, 502, 504)
_RETRY = Retry()


class Ending(Enum):
    """Why a batch sends nothing more."""

    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    BROKEN = "broken"  # `Run.fault` says why
    LEFT = "left"  # the server stops, and the next one goes on


class Run:
    """An open batch: what is left of it, what is in flight, and its result files.

    Args:
        batch_id: sent along as the name of the job.
        deadline_s: when its window ends, Unix time.
        plan: the lines that are not done; those apart are sent alone.
        source: the input file's descriptor.
    """

    def __init__(
        self, batch_id: str, deadline_s: float, plan: Plan, results: Results, source: int
    ) -> None:
        self.batch_id = batch_id
        self.deadline_s = deadline_s
        self.results = results
        self.source = source
        self.writing = asyncio.Lock()
        self.abort = asyncio.Event()
        self.settled = asyncio.Event()
        self.ending: Ending | None = None
        self.fault: Exception | None = None
        self.in_flight = 0
        self._suspects = deque(plan.apart)
        self._unsent = len(plan) + len(plan.apart)
        self._lines = iter(plan)
        self._look()

    @property
    def can_send(self) -> bool:
        """Whether it has a use for a slot."""
        return self._unsent > 0 and self.ending is None

    @property
    def sends_alone(self) -> bool:
        """Whether the next line must be in flight alone."""
        return bool(self._suspects) and self.can_send

    def claim(self) -> Claim:
        """What it asks of `share.next_batch`."""
        return Claim(self.deadline_s, self.in_flight, self._unsent + self.in_flight)

    def take(self) -> tuple[int, int]:
        """Where the next line is in the input."""
        self._unsent -= 1
        self.in_flight += 1
        return self._suspects.popleft() if self._suspects else next(self._lines)

    def give_back(self) -> None:
        """A line that was taken is done, or will not be."""
        self.in_flight -= 1
        self._look()

    def end(self, ending: Ending) -> None:
        """Send nothing more. The first reason stands."""
        self.ending = self.ending or ending
        self._look()

    def break_off(self, fault: Exception) -> None:
        """Send nothing more, because of `fault`."""
        if self.ending is None:
            self.fault = fault
        self.end(Ending.BROKEN)

    def _look(self) -> None:
        if self.in_flight == 0 and self._unsent == 0:
            self.ending = self.ending or Ending.COMPLETED
        if self.in_flight == 0 and self.ending is not None:
            self.settled.set()


class Sender:
    """The slots, and the open batches that share them.

    Args:
        app: the ASGI application that the lines are sent to.
        headers: sent with every line.
        in_flight: is told of every line that goes to the application.
        threads: for reading and writing files.
        leaving: once it is set, a result that cannot be written is given up.
    """

    def __init__(
        self,
        app: Application,
        headers: dict[str, str],
        max_in_flight: int,
        *,
        in_flight: InFlight,
        threads: Executor,
        leaving: asyncio.Event,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._app = app
        self._headers = headers
        self._slots = asyncio.Semaphore(max_in_flight)
        self._in_flight = in_flight
        self._is_held = False
        self._alone: asyncio.Task[None] | None = None
        self._threads = threads
        self._leaving = leaving
        self._clock = clock
        self._rng = rng
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._finished: deque[float] = deque()

    def add(self, run: Run) -> None:
        """Send from `run` too, until it is settled."""
        self._runs[run.batch_id] = run
        self._wake.set()

    def remove(self, run: Run) -> None:
        """Forget a run that is settled."""
        del self._runs[run.batch_id]

    def hold(self, held: bool) -> None:
        """Send nothing more while held; what is in flight goes on."""
        self._is_held = held
        self._wake.set()

    async def feed(self) -> None:
        """Fill the slots, for ever."""
        while True:
            await self._slots.acquire()
            run = await self._turn()
            is_alone = run.sends_alone
            task = asyncio.create_task(self._line(run, *run.take()))
            self._alone = task if is_alone else None
            self._tasks.add(task)
            task.add_done_callback(self._done)
            await asyncio.sleep(0)  # online requests share this loop

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._wake.set()  # a line may wait for this, to be alone

    async def _turn(self) -> Run:
        while True:
            ready = self._ready()
            if ready:
                claims = [run.claim() for run in ready]
                return ready[next_batch(claims, self._rate(), self._clock.wall_s())]
            self._wake.clear()
            await self._wake.wait()

    def _ready(self) -> list[Run]:
        """The runs that may send now."""
        if self._is_held or (self._alone in self._tasks):
            return []
        ready = [run for run in self._runs.values() if run.can_send]
        alone = [run for run in ready if run.sends_alone]
        if alone:
            return [] if self._tasks else alone
        return ready

    async def _line(self, run: Run, offset: int, length: int) -> None:
        try:
            request = await self._in_thread(read_request, run.source, offset, length)
            await self._write(run, await self._ask(run, request))
            self._finished.append(self._clock.monotonic_s())
        except Aborted:
            pass
        except Exception as e:
            run.break_off(e)
        finally:
            self._slots.release()
            run.give_back()

    async def _ask(self, run: Run, request: RequestLine) -> ResultLine:
        busy = lost = 0
        while True:
            headers = self._headers | {
                "x-sgl-conserve-class": "offline",
                "x-sgl-conserve-job": run.batch_id,
                "x-sgl-conserve-deadline-s": f"{run.deadline_s - self._clock.wall_s():.0f}",
            }
            reply = await self._post(run, request, headers)
            if reply.status in _BUSY:
                busy += 1
                asked_s = retry_after_s(reply.headers.get("retry-after"), self._clock.wall_s())
                # Spread out: all slots were refused at about the same time.
                wait_s = (asked_s or 0.0) + backoff_s(_RETRY, busy, self._rng)
            else:
                fault = fault_of(reply.body) if reply.status == 200 else None
                if fault and run.abort.is_set():
                    raise Aborted  # by us
                lost += 1
                if lost == MAX_ATTEMPTS and fault:
                    what = f"{fault} (tried {lost} times)"
                    return failed_line(request.custom_id, "aborted", what)
                if lost == MAX_ATTEMPTS or not (fault or reply.status in _FLAKY):
                    return result_line(
                        request.custom_id, reply.status, reply.body, _request_id(reply)
                    )
                wait_s = backoff_s(_RETRY, lost, self._rng)
            await first_of(self._clock.sleep(wait_s), run.abort.wait())
            if run.abort.is_set():
                raise Aborted

    async def _post(self, run: Run, request: RequestLine, headers: dict[str, str]) -> Reply:
        line = Line(run.batch_id, request.custom_id)
        await self._patiently(run, "a line", lambda: self._in_flight.begin(line))
        try:
            return await post(self._app, request.url, headers, bytes(request.body), run.abort)
        finally:
            self._in_flight.end(line)

    async def _write(self, run: Run, line: ResultLine) -> None:
        async def write() -> None:
            async with run.writing:
                await self._in_thread(run.results.add, line)

        await self._patiently(run, "a result", write)

    async def _patiently(self, run: Run, what: str, do: Callable[[], Awaitable[None]]) -> None:
        """Do it again until the disk takes it."""
        complained = False
        while True:
            try:
                await do()
                return
            except (JobError, OSError, StorageError) as e:
                if not complained:
                    logger.error("%s: %s waits for the disk: %s", run.batch_id, what, e)
                complained = True
            await first_of(self._clock.sleep(DISK_RETRY_S), self._leaving.wait())
            if self._leaving.is_set():
                raise Aborted

    def _rate(self) -> float:
        """Lines finished a second, over the last minute."""
        oldest_s = self._clock.monotonic_s() - _RATE_WINDOW_S
        while self._finished and self._finished[0] < oldest_s:
            self._finished.popleft()
        return len(self._finished) / _RATE_WINDOW_S

    async def _in_thread(self, do: Callable, *arguments: object):
        return await asyncio.get_running_loop().run_in_executor(self._threads, do, *arguments)


def _request_id(reply: Reply) -> str:
    return reply.headers.get("x-request-id") or f"req_{secrets.token_hex(12)}"


def result_line(custom_id: str, status: int, body: bytes, request_id: str) -> ResultLine:
    """The line for an HTTP answer."""
    try:
        text = body.decode()
        json = msgspec.json.format(text, indent=-1).encode()  # on one line
    except (msgspec.DecodeError, UnicodeDecodeError):
        json = msgspec.json.encode({"error": {"message": body.decode(errors="replace")}})
    response = LineResponse(status_code=status, request_id=request_id, body=msgspec.Raw(json))
    return ResultLine(id=new_line_id(), custom_id=custom_id, response=response, error=None)
