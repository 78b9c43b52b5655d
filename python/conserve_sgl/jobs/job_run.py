"""Runs a planned job: asks every line that is not finished, and stores what comes back."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from conserve_sgl.client.clock import Clock
from conserve_sgl.client.faults import Faults
from conserve_sgl.client.http import Client, LineFailed, NoSuchPath
from conserve_sgl.client.in_flight import send_all
from conserve_sgl.client.interrupt import Interrupt
from conserve_sgl.client.progress import DONE, INTERRUPTED, Meter, ProgressView
from conserve_sgl.client.retry import Attempts
from conserve_sgl.errors import InputError, JobError
from conserve_sgl.jobs.ask import ask, asked_path
from conserve_sgl.jobs.lm_eval.evaluate import Evaluation, load_tasks
from conserve_sgl.jobs.output_folder import OutputFolder
from conserve_sgl.jobs.plan import Line, Plan, PlannedTask, lines, make_plan
from conserve_sgl.jobs.records import Failure, Record
from conserve_sgl.jobs.schema import LoglikelihoodChoice, Sampling
from conserve_sgl.jobs.summary import (
    LmEvalSummary,
    Summary,
    Tally,
    print_lm_eval,
    print_summary,
)

__all__ = ["JobRun", "run_job"]


def run_job(
    path: Path,
    *,
    console: Console,
    endpoints: list[str] | None = None,
    discover: str | None = None,
    output: Path | None = None,
    max_in_flight: int | None = None,
    limit: int | None = None,
    fresh: bool = False,
    api_key: str | None = None,
    prefers_api_key: bool = False,
) -> int:
    """Run the job at `path` to its end, or go on with it, and return the exit code.

    Its JSONL tasks first, then its lm-eval tasks.

    Args:
        console: where progress and the summary go.
        endpoints, output, max_in_flight: replace what the file says.
        discover: a gateway, instead of the file's endpoints, as those are instead of its gateway.
        limit: replaces the limit of every task, lm-eval's too.
        fresh: throw away earlier results in the output folder first.
        api_key: the servers' key for a job that names none (`api_key_env`).
        prefers_api_key: take it for a job that names one too.

    Returns:
        0 when all lines are finished, 1 when some failed, 130 when it was interrupted.

    Raises:
        InputError: the job or its data is wrong; nothing was sent.
        JobError: it cannot start or go on; finished lines are kept.
    """
    try:
        plan = make_plan(
            path,
            endpoints=endpoints,
            discover=discover,
            output=None if output is None else str(output),
            max_in_flight=max_in_flight,
            limit=limit,
        )
        if plan.job.api_key_env is not None and not prefers_api_key:
            api_key = _api_key(path, plan.job.api_key_env)
        config = plan.job.lm_eval
        loaded = None if config is None else load_tasks(path, config)
        with OutputFolder(plan, fresh=fresh) as folder:
            evaluation = None
            if loaded is not None:
                evaluation = Evaluation(path, plan, folder, loaded, console, api_key=api_key)
                evaluation.prepare(fresh=fresh)
            run = JobRun(plan, folder, console, api_key=api_key)
            code = asyncio.run(run.run()) if plan.tasks else DONE
            if evaluation is None or code == INTERRUPTED:
                return code
            try:
                evaluation.run()
            finally:
                result = evaluation.summary()
                print_lm_eval(console, plan, result)
                folder.write_summary(run.summary(result))
            return INTERRUPTED if result.partial else code
    except KeyboardInterrupt:  # while nothing was being sent yet
        return INTERRUPTED


def _api_key(path: Path, variable: str) -> str:
    if not os.environ.get(variable):
        reason = f"environment variable {variable} is not set"
        raise InputError(path, reason, key="api_key_env")
    if not os.environ[variable].isprintable():
        reason = f"environment variable {variable} holds what cannot be sent, such as a line break"
        raise InputError(path, reason, key="api_key_env")
    return os.environ[variable]


def _context_tokens(models: Any) -> int | None:
    """What an answer to GET /v1/models says of the context of its first model."""
    try:
        tokens = models["data"][0]["max_model_len"]
    except (KeyError, IndexError, TypeError):
        return None
    return tokens if type(tokens) is int else None


def _check_length(planned: PlannedTask, context_tokens: int | None) -> None:
    if context_tokens is None or isinstance(planned.task.score, LoglikelihoodChoice):
        return
    wanted_tokens = (planned.task.sampling or Sampling()).max_new_tokens
    if wanted_tokens >= context_tokens:
        raise JobError(
            f"{planned.task.name}: max_new_tokens {wanted_tokens} leaves no token for a "
            f"prompt in the model's context of {context_tokens}. Nothing was sent"
        )


class JobRun:
    """One run of a plan into its open output folder."""

    def __init__(
        self,
        plan: Plan,
        folder: OutputFolder,
        console: Console,
        *,
        api_key: str | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
    ) -> None:
        self._plan = plan
        self._job = plan.job
        self._folder = folder
        self._console = console
        self._api_key = api_key
        self._clock = clock or Clock()
        self._rng = random.Random(seed)
        self._tallies = {t.task.name: Tally(len(t.ids)) for t in plan.tasks}
        self._done = {t.task.name: folder.finished(t, self._tally(t).add) for t in plan.tasks}
        self._started_s = self._clock.monotonic_s()
        self._meter = Meter(plan.total, self._started_s)
        self._meter.resumed = sum(len(done) for done in self._done.values())
        self._faults = Faults()
        self._checking = asyncio.Lock()
        self._lengths_checked = False
        self._failures_in_a_row = 0
        self._run_s = 0.0

    async def run(self) -> int:
        """Send what is not finished; return the exit code. Raises JobError."""
        try:
            with ProgressView(self._console, self._plan.name, self._meter) as view:
                self._interrupt = Interrupt(self._job.drain_s, view.say)
                if self._meter.resumed:
                    view.say(f"{self._meter.resumed} of {self._meter.total} lines are done already")
                await self._send_all(view)
            self._folder.sync()
        except BaseException:
            with suppress(JobError):  # the first error is the one to show
                self._finish()
            raise
        self._finish()
        return self._meter.exit_code()

    async def _send_all(self, view: ProgressView) -> None:
        count = min(self._job.max_in_flight, self._meter.left)
        if count == 0:
            return
        async with self._client() as client:
            await send_all(
                self._pending(),
                partial(self._answer, client),
                in_flight=count,
                interrupt=self._interrupt,
                ticker=view.keep_fresh(self._clock, self._folder.sync),
            )

    def _client(self) -> Client:
        return Client(
            self._job,
            name=self._plan.name,
            deadline_s=self._clock.deadline_s(self._job.deadline_s),
            api_key=self._api_key,
            identify=self._folder.set_model,
            note=self._meter.noted,
            stopping=self._interrupt.stopping,
            clock=self._clock,
            rng=self._rng,
        )

    def _pending(self) -> Iterator[tuple[PlannedTask, Line]]:
        # In order, so that neighbours, which share prefixes, are in flight together.
        for planned in self._plan.tasks:
            done = self._done[planned.task.name]
            yield from ((planned, line) for line in lines(planned) if line.id not in done)

    async def _check_lengths(self, client: Client) -> None:
        """Refuse answers that are as long as the model's context, where the server tells it.

        The first line asks, and the others wait for what comes back.
        """
        async with self._checking:
            if self._lengths_checked:
                return
            context_tokens = None
            with suppress(JobError):  # what is wrong with the server, the lines will say
                context_tokens = _context_tokens(await client.get("/v1/models"))
            for planned in self._plan.tasks:
                _check_length(planned, context_tokens)
            self._lengths_checked = True

    async def _answer(self, client: Client, asked: tuple[PlannedTask, Line]) -> None:
        await self._check_lengths(client)
        planned, line = asked
        attempts = Attempts()
        try:
            record = await ask(client, self._job, planned.task, line, attempts, self._clock)
        except LineFailed as failed:
            self._failed(planned, line, failed, attempts)
        else:
            self._finished(planned, record)

    def _finished(self, planned: PlannedTask, record: Record) -> None:
        self._folder.add(planned.task.name, record)
        self._tally(planned).add(record)
        self._meter.count(record.prompt_tokens, record.completion_tokens)
        self._failures_in_a_row = 0

    def _failed(
        self, planned: PlannedTask, line: Line, failed: LineFailed, attempts: Attempts
    ) -> None:
        failure = Failure(
            id=line.id,
            line=line.line,
            status=failed.status,
            error=str(failed),
            attempts=attempts.sent,
        )
        self._folder.add_failure(planned.task.name, failure)
        self._tally(planned).failed += 1
        self._meter.failed += 1
        self._faults.add(f"{planned.data}:{line.line}", failed.status, str(failed))
        if isinstance(failed, NoSuchPath) and self._all_go_to(failed.path):
            raise JobError(str(failed)) from failed
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._job.retry.max_failures_in_a_row:
            raise JobError(
                f"{self._failures_in_a_row} lines failed in a row, the last one at "
                f"{planned.data}:{line.line}: {failed}. Finished lines are kept; run the same "
                "command again to go on"
            )

    def _all_go_to(self, path: str) -> bool:
        return all(asked_path(planned.task) == path for planned in self._plan.tasks)

    def _tally(self, planned: PlannedTask) -> Tally:
        return self._tallies[planned.task.name]

    def summary(self, lm_eval: LmEvalSummary | None = None) -> Summary:
        """What this run has come to so far; `lm_eval` is what came after it."""
        meter = self._meter
        return Summary(
            job=self._plan.name,
            model=self._folder.job_file.model,
            partial=meter.left > 0 or (lm_eval is not None and lm_eval.partial),
            run_s=self._run_s,
            run_lines=meter.done,
            run_retries=meter.retries,
            run_prompt_tokens=meter.prompt_tokens,
            run_completion_tokens=meter.completion_tokens,
            tasks={name: tally.summary() for name, tally in self._tallies.items()},
            lm_eval=lm_eval,
        )

    def _finish(self) -> None:
        self._run_s = round(self._clock.monotonic_s() - self._started_s, 3)
        summary = self.summary()
        print_summary(self._console, self._plan, summary, self._faults)
        self._folder.write_summary(summary)
