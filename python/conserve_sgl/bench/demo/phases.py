"""The two phases of the demo: an online stream alone, then the same stream beside a job."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from conserve_sgl.bench.demo.config import DemoConfig, fill
from conserve_sgl.bench.load.arrivals import Arrival
from conserve_sgl.bench.load.prompts import WARMUP_DRAW, TimedRequest, timed_requests
from conserve_sgl.bench.load.record import LoadResult, RequestRecord
from conserve_sgl.bench.load.streams import replay
from conserve_sgl.bench.report.environment import environment
from conserve_sgl.bench.report.offline import OfflineRecord, read_results
from conserve_sgl.bench.report.results import Result, Run
from conserve_sgl.bench.report.system import SystemConfig
from conserve_sgl.bench.systems.probe import Reading, read_server
from conserve_sgl.bench.systems.progress import PlainProgress
from conserve_sgl.bench.systems.server import (
    ManagedProcess,
    ServerProcess,
    check_free,
    free_port,
)
from conserve_sgl.errors import JobError, ServerError
from conserve_sgl.profile import DIR_ENV

__all__ = ["ALONE", "ARRIVALS", "BESIDE", "Demo"]

ALONE, BESIDE = "online alone", "online beside the job"
ARRIVALS = "arrivals_received"
"""A counter that servers with conserve show, and no others."""


class Demo:
    """One run of the demo; `run` may be called once.

    Args:
        config: what to run.
        model: path or name of the model, for {model} in the server's command.
        out: folder for results and logs; made when missing.
        console: where progress goes.
        port: for the server; None takes a free one.

    Raises:
        ServerError: something listens on the port.
    """

    def __init__(
        self,
        config: DemoConfig,
        model: str,
        out: Path,
        console: Console,
        *,
        port: int | None = None,
    ) -> None:
        self.config = config
        self.out = out
        self.console = console
        self.plain = PlainProgress(console)
        if port is None:
            port = free_port()
        else:
            check_free(port)
        self.values = {
            "python": sys.executable,
            "model": model,
            "port": str(port),
            "url": f"http://127.0.0.1:{port}",
            "out": str(out),
        }
        # A machine that is busy now must not be what later servers take for their own pace.
        self.server_env = {DIR_ENV: str((out / "profiles").resolve())}
        self.server = ServerProcess(
            self._filled(config.server.command),
            port=port,
            log_path=out / "server.log",
            env=self.server_env,
        )
        self.job = ManagedProcess(
            self._filled(config.offline.command),
            log_path=out / "job.log",
            stop_signal=signal.SIGINT,  # it keeps its results and could go on from there
            grace_s=config.offline.stop_s,
        )
        self.arrivals = config.online.arrivals.draw(config.online.duration_s, config.seed)
        self.environment = environment()
        self._ready_s = 0.0

    def run(self, on_alone: Callable[[Result], None] = lambda _: None) -> tuple[Result, Result]:
        """Measure both phases: the two results. `on_alone` gets the first as soon as it is there.

        Raises:
            ServerError: the server did not start, or died.
            JobError: the job failed.
        """
        with self.server:
            self._wait_ready()
            self._warm_up()
            alone = self._alone()
            on_alone(alone)
            return alone, self._beside_job()

    def _filled(self, command: Sequence[str]) -> list[str]:
        return [fill(argument, self.values) for argument in command]

    def _wait_ready(self) -> None:
        log = f"(log: {self.server.log_path})"
        self.plain.say(f"Starting the server {log}")
        with self.console.status("") as status:

            def on_wait(waited_s: float) -> None:
                text = f"Starting the server: {waited_s:.0f} s {log}"
                status.update(text)
                self.plain.still(text)

            self._ready_s = self.server.wait_healthy(self.config.server.ready_timeout_s, on_wait)
        self.console.print(f"Server ready after {self._ready_s:.0f} s: {self.server.base_url}")

    def _warm_up(self) -> None:
        first = self.arrivals[: self.config.server.warmup_requests]
        at_once = [Arrival(0.0, arrival.prompt_tokens, arrival.output_tokens) for arrival in first]
        result = self._replay(self._requests(at_once, WARMUP_DRAW), "warm-up")
        for record in result.records:
            if not record.completed:
                raise ServerError(f"a warm-up request failed: {record.error}")

    def _alone(self) -> Result:
        before = self._read()
        load = self._stream(1, ALONE)
        return self._result(ALONE, load, before, self._read())

    def _beside_job(self) -> Result:
        before = self._read()
        with self.job:
            self._check_job(self.job.wait(self.config.offline.lead_s))
            load = self._stream(2, BESIDE)
            after = self._read()
            self._check_job(self.job.returncode)
            if self.job.returncode == 0:
                self.console.print("The job ended before the online stream: give it more to do.")
            with self.console.status("Stopping the job"):
                self.job.stop()
        job = read_results(Path(fill(self.config.offline.output, self.values)))
        return self._result(BESIDE, load, before, after, job)

    def _stream(self, number: int, name: str) -> LoadResult:
        result = self._replay(self._requests(self.arrivals, number), name)
        self.server.check()
        return result

    def _read(self) -> Reading:
        try:
            return asyncio.run(read_server(self.server.base_url))
        except (aiohttp.ClientError, OSError) as e:
            reason = f"the server stopped answering: {e!r} (log: {self.server.log_path})"
            raise ServerError(reason) from e

    def _check_job(self, returncode: int | None) -> None:
        """A job may end well before the stream does; None and 0 are both fine."""
        if returncode:
            raise JobError(
                f"the job ended with status {returncode}; the end of {self.job.log_path}:\n"
                f"{self.job.log_tail()}"
            )

    def _requests(self, arrivals: Sequence[Arrival], number: int) -> tuple[TimedRequest, ...]:
        """Prompts differ by `number`, or the prefix cache would serve the second phase."""
        return timed_requests(arrivals, self.config.online.token_ids, [self.config.seed, number])

    def _replay(self, requests: Sequence[TimedRequest], name: str) -> LoadResult:
        columns = TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn()
        lasts_s = max((request.arrival.at_s for request in requests), default=0)
        self.plain.say(f"{name}: {len(requests)} requests over {lasts_s:.0f} s")
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            task = progress.add_task(name, total=len(requests))

            def on_done(_: RequestRecord) -> None:
                progress.advance(task)
                done = progress.tasks[task].completed
                self.plain.still(f"{name}: {done:.0f}/{len(requests)}")

            return asyncio.run(
                replay(
                    self.server.base_url,
                    requests,
                    drain_s=self.config.online.drain_s,
                    on_done=on_done,
                )
            )

    def _result(
        self,
        name: str,
        load: LoadResult,
        before: Reading,
        after: Reading,
        job: tuple[OfflineRecord, ...] | None = None,
    ) -> Result:
        config = self.config
        kind = "conserve" if ARRIVALS in after.counters else "stock"
        run = Run(
            system=SystemConfig(name, kind, "online" if job is None else "both"),
            repeat=1,
            fingerprint="demo",
            model=self.values["model"],
            seed=config.seed,
            slo=config.slo,
            started_unix_s=load.started_unix_s,
            window_s=config.online.duration_s,
            duration_s=load.duration_s,
            ready_s=self._ready_s,
            idle_share=None,
            counters_before=before.counters,
            counters_after=after.counters,
            command=[sys.executable, "-m", "conserve_sgl.bench.demo", *sys.argv[1:]],
            server_command=self.server.argv,
            server_env=self.server_env,
            environment=self.environment,
        )
        return Result(run, load.records, job)
