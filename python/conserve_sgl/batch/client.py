"""`conserve run-batch`: a batch file against one or more endpoints, without a Batch API.

The input, the output and the error file are those of a batch. Every line goes out as offline work:
with the header, and because gateways drop headers with `service_tier` and `priority` in its body.

Lines in the output file are done; running the same command again sends the others, those of the
error file included.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from rich.console import Console

from conserve_sgl.batch.results import Results, usage_of
from conserve_sgl.batch.schema import BatchError, ResultLine, failed_line
from conserve_sgl.batch.sender import result_line, was_aborted
from conserve_sgl.batch.validate import (
    InputRefused,
    Limits,
    Plan,
    RequestLine,
    read_plan,
    read_request,
)
from conserve_sgl.errors import InputError, JobError
from conserve_sgl.jobs.client import Attempts, BadReply, Client, Clock, LineFailed, Stopped
from conserve_sgl.jobs.interrupt import Interrupt
from conserve_sgl.jobs.progress import Meter, ProgressView
from conserve_sgl.jobs.schema import Retry, check_endpoint

__all__ = ["RunBatch", "run_batch"]

DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130
TICK_S = 1.0
_FIRST_BYTES = b'{"id":"batch_req_'
# A file of one's own may be as large as one likes.
_LIMITS = Limits(max_requests=sys.maxsize, max_embedding_inputs=sys.maxsize)


class RunBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What to run, and where.

    Args:
        input, output, errors: three different files; the last two are made.
        endpoints: base URLs without /v1.
        priority: sent in every body; None sends none.
        request_timeout_s: gives a request up and counts it as lost; None waits for ever.
        drain_s: how long an interrupt waits for what is in flight.
    """

    input: Path
    output: Path
    errors: Path
    endpoints: list[str]
    max_in_flight: int = 64
    priority: int | None = -1
    api_key: str | None = None
    request_timeout_s: float | None = None
    drain_s: float = 10.0
    retry: Retry = msgspec.field(default_factory=Retry)


def run_batch(job: RunBatch, *, console: Console) -> int:
    """Run it to its end, or go on with it, and return the exit code.

    Returns:
        0 when every line is in the output file, 1 when some failed, 130 when it was interrupted.

    Raises:
        InputError: the input or the files are wrong; nothing was sent.
        JobError: it cannot start or go on; finished lines are kept.
    """
    try:
        _check(job)
        _read(job, console)
        with _locked(job.output):
            plan, results = _open(job)
            try:
                return asyncio.run(_Run(job, plan, results, console).run())
            finally:
                results.close()
    except KeyboardInterrupt:  # while nothing was being sent yet
        return INTERRUPTED
    except OSError as e:
        where = f" {e.filename}" if e.filename else ""
        raise JobError(f"cannot read or write{where}: {e.strerror or e}") from e


def _check(job: RunBatch) -> None:
    for endpoint in job.endpoints:
        try:
            check_endpoint(endpoint)
        except ValueError as e:
            raise InputError("--endpoint", str(e).removeprefix("endpoints: ")) from e
    paths = [path.resolve() for path in (job.input, job.output, job.errors)]
    if len(set(paths)) < 3:
        raise InputError(job.output, "input, output and error file must be three different files")


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """The output file, for this run alone."""
    fd = os.open(output, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as e:
        raise JobError(f"another run is writing to {output}") from e
    finally:
        os.close(fd)


def _read(job: RunBatch, console: Console) -> None:
    """Look for faults in what is there, before anything is made or changed."""
    if job.input.exists() and not job.input.is_file():
        raise InputError(job.input, "must be a regular file: it is read more than once")
    try:
        read_plan(job.input, None, _LIMITS)
    except InputRefused as e:
        for error in e.errors[1:]:
            fault = str(_fault(job.input, error))
            console.print(fault, style="red", markup=False, soft_wrap=True)
        raise _fault(job.input, e.errors[0]) from e
    except OSError as e:
        raise InputError(job.input, f"cannot be read: {e.strerror or e}") from e
    for path in (job.output, job.errors):
        with suppress(FileNotFoundError), path.open("rb") as file:
            # A first line that a crash has torn is one of ours all the same.
            if not _FIRST_BYTES.startswith(file.read(len(_FIRST_BYTES))):
                raise InputError(path, "is there, and no batch made it; use another file")


def _open(job: RunBatch) -> tuple[Plan, Results]:
    """The lines to send, and the files to write."""
    job.errors.unlink(missing_ok=True)
    results = Results(job.output, job.errors)
    plan = read_plan(job.input, None, _LIMITS, done=results.done)
    if len(plan) + len(results.done) != plan.total:
        results.close()
        raise InputError(job.output, f"has lines that are not of {job.input}; use another file")
    return plan, results


def _fault(path: Path, error: BatchError) -> InputError:
    return InputError(path, error.message, line=error.line, key=error.param)


class _Run:
    """One run of a plan into open files."""

    def __init__(self, job: RunBatch, plan: Plan, results: Results, console: Console) -> None:
        self._job = job
        self._results = results
        self._console = console
        self._clock = Clock()
        self._lines = iter(plan)
        self._count = min(job.max_in_flight, len(plan))
        self._meter = Meter(plan.total, self._clock.monotonic_s())
        self._meter.resumed = len(results.done)

    async def run(self) -> int:
        meter = self._meter
        with ProgressView(self._console, self._job.input.name, meter) as view:
            if meter.resumed:
                view.say(f"{meter.resumed} of {meter.total} lines are done already")
            if self._count:
                await self._send_all(view)
            self._results.sync()
        self._console.print(
            f"{meter.resumed + meter.done} of {meter.total} lines are in {self._job.output}, "
            f"{meter.failed} in {self._job.errors}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if not meter.failed:
            self._job.errors.unlink(missing_ok=True)
        if meter.left:
            return INTERRUPTED
        return SOME_FAILED if meter.failed else DONE

    async def _send_all(self, view: ProgressView) -> None:
        interrupt = Interrupt(self._job.drain_s, view.say)
        source = os.open(self._job.input, os.O_RDONLY)
        client = Client(
            self._job,
            name=self._job.input.stem,
            deadline_s=None,
            api_key=self._job.api_key,
            identify=lambda _: None,
            note=self._note,
            stopping=interrupt.stopping,
            clock=self._clock,
            rng=random.Random(),
        )
        try:
            async with client:
                workers = [
                    self._work(client, source, interrupt.stopping) for _ in range(self._count)
                ]
                await interrupt.run(workers, self._tick(view))
        finally:
            os.close(source)

    async def _work(self, client: Client, source: int, stopping: asyncio.Event) -> None:
        for where in self._lines:
            request = read_request(source, *where)
            try:
                line = await self._ask(client, request)
            except Stopped:
                return
            self._finished(line)
            if stopping.is_set():
                return

    async def _ask(self, client: Client, request: RequestLine) -> ResultLine:
        body = msgspec.json.decode(request.body) | {"service_tier": "flex"}
        if self._job.priority is not None:
            body["priority"] = self._job.priority
        try:
            answer, _ = await client.post(request.url, body, _whole, Attempts())
        except LineFailed as e:
            if e.status is None or e.body is None:
                return failed_line(request.custom_id, "request_failed", str(e))
            return result_line(request.custom_id, e.status, e.body, _request_id())
        return result_line(request.custom_id, 200, answer, _request_id())

    def _finished(self, line: ResultLine) -> None:
        self._results.add(line)
        if not line.succeeded:
            self._meter.failed += 1
            return
        usage = usage_of(line.response.body)
        self._meter.done += 1
        self._meter.prompt_tokens += usage.input_tokens
        self._meter.completion_tokens += usage.output_tokens

    def _note(self, text: str | None) -> None:
        self._meter.note = text
        self._meter.retries += text is not None

    async def _tick(self, view: ProgressView) -> None:
        while True:
            view.refresh(self._clock.monotonic_s())
            await self._clock.sleep(TICK_S)
            await asyncio.to_thread(self._results.sync)


def _whole(raw: bytes) -> bytes:
    if was_aborted(raw):
        raise BadReply("aborted by the server")
    msgspec.json.decode(raw)
    return raw


def _request_id() -> str:
    return f"req_{secrets.token_hex(12)}"
