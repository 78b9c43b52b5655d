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
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console

from conserve_sgl.batch.answers import usage_of
from conserve_sgl.batch.ask import OFFLINE_PRIORITY, ask, failure
from conserve_sgl.batch.remote_files import STDIN, at_hand, is_url, local_copy, put, shown
from conserve_sgl.batch.results import Results
from conserve_sgl.batch.schema import BatchError, ResultLine
from conserve_sgl.batch.validate import (
    InputRefused,
    Limits,
    Plan,
    read_plan,
    read_request,
)
from conserve_sgl.client.bounds import MOST_INT32, MOST_S
from conserve_sgl.client.clock import Clock
from conserve_sgl.client.faults import Faults
from conserve_sgl.client.http import Client, LineFailed, NoSuchPath
from conserve_sgl.client.in_flight import send_all
from conserve_sgl.client.interrupt import Interrupt
from conserve_sgl.client.progress import INTERRUPTED, Meter, ProgressView
from conserve_sgl.client.retry import Retry
from conserve_sgl.errors import InputError, JobError
from conserve_sgl.urls import check_base_url

__all__ = ["RunBatch", "run_batch"]

_FIRST_BYTES = b'{"id":"batch_req_'
# A file of one's own may be as large as one likes.
_LIMITS = Limits(max_requests=sys.maxsize, max_embedding_inputs=sys.maxsize)


class RunBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What to run, and where. Numbers that no server or timer takes are refused by `run_batch`.

    Args:
        input, output, errors: three different files, each a path or an http(s) URL; the last two
            are made. From a URL the input is fetched. To a URL results are put at the end, and
            until then are in a file of that name in the current folder. The input may be `-`.
        endpoints: base URLs without /v1.
        discover: base URL of a gateway whose workers are the endpoints, instead.
        priority: sent in every body; None sends none.
        request_timeout_s: gives a request up and counts it as lost; None waits for ever.
        drain_s: how long an interrupt waits for what is in flight.
    """

    input: str
    output: str
    errors: str
    endpoints: list[str]
    discover: str | None = None
    max_in_flight: int = 64
    priority: int | None = OFFLINE_PRIORITY
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
        with at_hand(job.input, job.retry) as source:
            files = _Files(
                input=source,
                shown_input=shown(job.input),
                output=local_copy(job.output),
                errors=local_copy(job.errors),
            )
            code = _run(job, files, console)
        if code != INTERRUPTED:
            _put(job, files, console)
        return code
    except KeyboardInterrupt:  # while nothing was being sent
        return INTERRUPTED
    except OSError as e:
        where = f" {e.filename}" if e.filename else ""
        raise JobError(f"cannot read or write{where}: {e.strerror or e}") from e


class _Files(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a run on this machine."""

    input: Path
    shown_input: str
    output: Path
    errors: Path


def _run(job: RunBatch, files: _Files, console: Console) -> int:
    _read(files, console)
    with _locked(files.output):
        plan, results = _open(files)
        try:
            return asyncio.run(_Run(job, files, plan, results, console).run())
        finally:
            results.close()


def _put(job: RunBatch, files: _Files, console: Console) -> None:
    for path, place in ((files.output, job.output), (files.errors, job.errors)):
        if is_url(place) and path.exists():
            put(path, place, job.retry)
            console.print(f"{path} is at {shown(place)}", markup=False, soft_wrap=True)


def _check(job: RunBatch) -> None:
    if job.discover is not None and job.endpoints:
        raise InputError("--discover", "finds the endpoints: leave --endpoint out")
    urls = [("--endpoint", endpoint) for endpoint in job.endpoints]
    if job.discover is not None:
        urls.append(("--discover", job.discover))
    for option, url in urls:
        try:
            check_base_url(url)
        except ValueError as e:
            raise InputError(option, str(e)) from e
    timeout_s, priority = job.request_timeout_s, job.priority
    if timeout_s is not None and not 0 < timeout_s <= MOST_S:  # nor what is no number
        raise InputError("--request-timeout-s", f"must be above 0 and at most {MOST_S}")
    if priority is not None and abs(priority) > MOST_INT32:
        raise InputError("--priority", f"must be from -{MOST_INT32} to {MOST_INT32}")
    here = [local_copy(job.output), local_copy(job.errors)]
    if not is_url(job.input) and job.input != STDIN:
        here.append(Path(job.input))
    is_twice = len({path.resolve() for path in here}) < len(here)
    if is_twice or job.input in (job.output, job.errors):
        raise InputError(
            shown(job.output), "input, output and error file must be three different files"
        )


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """The output file, for this run alone."""
    try:
        fd = os.open(output, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise _unwritable(output, e) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as e:
        raise JobError(f"another run is writing to {output}") from e
    finally:
        os.close(fd)


def _read(files: _Files, console: Console) -> None:
    """Look for faults in what is there, before anything is made or changed."""
    try:
        read_plan(files.input, None, _LIMITS)
    except InputRefused as e:
        for error in e.errors[1:]:
            fault = str(_fault(files.shown_input, error))
            console.print(fault, style="red", markup=False, soft_wrap=True)
        raise _fault(files.shown_input, e.errors[0]) from e
    except OSError as e:
        raise InputError(files.shown_input, f"cannot be read: {e.strerror or e}") from e
    for path in (files.output, files.errors):
        try:
            with suppress(FileNotFoundError), path.open("rb") as file:
                # A first line that a crash has torn is one of ours all the same.
                if not _FIRST_BYTES.startswith(file.read(len(_FIRST_BYTES))):
                    raise InputError(path, "is there, and no batch made it; use another file")
        except OSError as e:
            raise _unwritable(path, e) from e
        if not path.parent.is_dir():
            raise InputError(path, "cannot be written: its folder is not there")


def _open(files: _Files) -> tuple[Plan, Results]:
    """The lines to send, and the files to write."""
    try:
        files.errors.unlink(missing_ok=True)
        results = Results(files.output, files.errors)
    except OSError as e:
        raise _unwritable(files.errors, e) from e
    plan = read_plan(files.input, None, _LIMITS, done=results.done)
    if len(plan) + len(results.done) != plan.total:
        results.close()
        raise InputError(
            files.output, f"has lines that are not of {files.shown_input}; use another file"
        )
    return plan, results


def _unwritable(path: Path, e: OSError) -> InputError:
    return InputError(e.filename or path, f"cannot be written: {e.strerror or e}")


def _fault(path: str, error: BatchError) -> InputError:
    return InputError(path, error.message, line=error.line, key=error.param)


class _Run:
    """One run of a plan into open files."""

    def __init__(
        self, job: RunBatch, files: _Files, plan: Plan, results: Results, console: Console
    ) -> None:
        self._job = job
        self._files = files
        self._results = results
        self._console = console
        self._clock = Clock()
        self._plan = plan
        self._meter = Meter(plan.total, self._clock.monotonic_s())
        self._meter.resumed = len(results.done)
        self._faults = Faults()

    async def run(self) -> int:
        meter = self._meter
        try:
            with ProgressView(self._console, self._files.input.name, meter) as view:
                if meter.resumed:
                    view.say(f"{meter.resumed} of {meter.total} lines are done already")
                if len(self._plan):
                    await self._send_all(view)
                self._results.sync()
        finally:
            self._finish()
        return meter.exit_code()

    def _finish(self) -> None:
        """Say what is where; a file for errors that has none goes."""
        meter, files = self._meter, self._files
        say = {"markup": False, "highlight": False, "soft_wrap": True}
        for line in self._faults.lines():
            self._console.print(f"failed: {line}", **say)
        where = f", {meter.failed} in {files.errors}" if meter.failed else ""
        done = meter.resumed + meter.done
        self._console.print(f"{done} of {meter.total} lines are in {files.output}{where}", **say)
        if not meter.failed:
            files.errors.unlink(missing_ok=True)

    async def _send_all(self, view: ProgressView) -> None:
        interrupt = Interrupt(self._job.drain_s, view.say)
        source = os.open(self._files.input, os.O_RDONLY)
        client = Client(
            self._job,
            name=self._files.input.stem,
            deadline_s=None,
            api_key=self._job.api_key,
            identify=lambda _: None,
            note=self._meter.noted,
            stopping=interrupt.stopping,
            clock=self._clock,
            rng=random.Random(),
        )
        try:
            async with client:
                await send_all(
                    iter(self._plan),
                    partial(self._answer, client, source),
                    in_flight=min(self._job.max_in_flight, len(self._plan)),
                    interrupt=interrupt,
                    ticker=view.keep_fresh(self._clock, self._results.sync),
                )
        finally:
            os.close(source)

    async def _answer(self, client: Client, source: int, where: tuple[int, int]) -> None:
        request = read_request(source, *where)
        try:
            line = await ask(client, request, priority=self._job.priority)
        except LineFailed as e:
            self._failed(request.custom_id, e)
        else:
            self._finished(line)

    def _failed(self, custom_id: str, failed: LineFailed) -> None:
        self._results.add(failure(custom_id, failed))
        self._meter.failed += 1
        self._faults.add(custom_id, failed.status, str(failed))
        if isinstance(failed, NoSuchPath) and self._plan.urls == {failed.path}:
            raise JobError(str(failed)) from failed

    def _finished(self, line: ResultLine) -> None:
        self._results.add(line)
        usage = usage_of(line.response.body)
        self._meter.count(usage.input_tokens, usage.output_tokens)
