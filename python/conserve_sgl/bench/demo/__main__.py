"""The demo: one server, an online stream alone, then the same stream beside an offline job.

    python -m conserve_sgl.bench.demo --model PATH --config configs/bench/demo.yaml --out out/demo

Writes `table.md`, `demo.png`, `demo.json` and the logs of the server and the job into the output
folder, and stops what it started, however it ends.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
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
from conserve_sgl.bench.load.prompts import TimedRequest, timed_requests
from conserve_sgl.bench.load.record import LoadResult, RequestRecord
from conserve_sgl.bench.load.streams import replay
from conserve_sgl.bench.report.environment import Environment, environment
from conserve_sgl.bench.report.metrics import Slo
from conserve_sgl.bench.report.offline import read_results
from conserve_sgl.bench.report.phases import Phase, markdown_table, plot_phases, rich_table
from conserve_sgl.bench.systems.progress import PlainProgress
from conserve_sgl.bench.systems.server import (
    ManagedProcess,
    ServerProcess,
    check_free,
    free_port,
    stop_on_signals,
)
from conserve_sgl.errors import ConserveError, JobError, ServerError
from conserve_sgl.profile import DIR_ENV
from conserve_sgl.strict_yaml import load_yaml

__all__ = ["Demo", "main"]

ALONE, BESIDE = "online alone", "online beside the job"
_WARMUP_SEED = 0  # phases count from 1


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
        self.server = ServerProcess(
            self._filled(config.server.command),
            port=port,
            log_path=out / "server.log",
            # A machine that is busy now must not be what later servers take for their own pace.
            env={DIR_ENV: str((out / "profiles").resolve())},
        )
        self.job = ManagedProcess(
            self._filled(config.offline.command),
            log_path=out / "job.log",
            stop_signal=signal.SIGINT,  # it keeps its results and could go on from there
            grace_s=config.offline.stop_s,
        )
        self.arrivals = config.online.arrivals.draw(config.online.duration_s, config.seed)
        self.engine_state: dict[str, Any] | None = None

    def run(self) -> tuple[Phase, Phase]:
        """Measure both phases.

        Raises:
            ServerError: the server did not start, or died.
            JobError: the job failed.
        """
        with self.server:
            self._wait_ready()
            self._warm_up()
            alone = self._phase(ALONE, self._stream(1, ALONE))
            if warning := alone_warning(alone, self.config.slo):
                self.console.print(warning, style="yellow", highlight=False)
            beside = self._stream_beside_job()
            self.engine_state = read_engine_state(self.server.base_url)
        return alone, beside

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

            took_s = self.server.wait_healthy(self.config.server.ready_timeout_s, on_wait)
        self.console.print(f"Server ready after {took_s:.0f} s: {self.server.base_url}")

    def _warm_up(self) -> None:
        first = self.arrivals[: self.config.server.warmup_requests]
        at_once = [Arrival(0.0, arrival.prompt_tokens, arrival.output_tokens) for arrival in first]
        result = self._replay(self._requests(at_once, _WARMUP_SEED), "warm-up")
        for record in result.records:
            if not record.completed:
                raise ServerError(f"a warm-up request failed: {record.error}")

    def _stream(self, number: int, name: str) -> LoadResult:
        result = self._replay(self._requests(self.arrivals, number), name)
        self.server.check()
        return result

    def _stream_beside_job(self) -> Phase:
        with self.job:
            self._check_job(self.job.wait(self.config.offline.lead_s))
            result = self._stream(2, BESIDE)
            self._check_job(self.job.returncode)
            if self.job.returncode == 0:
                self.console.print("The job ended before the online stream: give it more to do.")
            with self.console.status("Stopping the job"):
                self.job.stop()
        return self._phase(BESIDE, result, Path(fill(self.config.offline.output, self.values)))

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

    def _phase(self, name: str, result: LoadResult, job_output: Path | None = None) -> Phase:
        return Phase(
            name=name,
            started_unix_s=result.started_unix_s,
            window_s=self.config.online.duration_s,
            duration_s=result.duration_s,
            online=result.records,
            offline=None if job_output is None else read_results(job_output),
        )


def alone_warning(alone: Phase, slo: Slo) -> str:
    """What to know before the figures are read; empty when online work alone met the objectives."""
    online = alone.online_summary(slo)
    missed = online.sent - online.good
    if not missed:
        return ""
    return (
        f"{missed} of {online.sent} online requests missed an objective with no offline work "
        "beside them: something else runs on this machine, or it is too slow for them. The "
        "figures beside the job do not show what offline work costs."
    )


def read_engine_state(base_url: str) -> dict[str, Any] | None:
    """What conserve's scheduler counted since it started; None from a server without conserve."""
    try:
        with urllib.request.urlopen(f"{base_url}/server_info", timeout=10) as response:
            return msgspec.json.decode(response.read())["internal_states"][0]["conserve"]
    except (OSError, KeyError):
        return None


def arrival_line(state: dict[str, Any] | None) -> str:
    """How long an online arrival took from the tokenizer process to the scheduler."""
    if state is None:
        return ""
    arrivals, latency = state["arrivals_received"], state["arrival_ms"]
    return (
        f"Arrival to scheduler, the step that runs included: P50 {latency['p50']:.1f} ms, "
        f"P99 {latency['p99']:.1f} ms over {arrivals} arrivals.\n"
    )


def write_results(demo: Demo, phases: Sequence[Phase], on: Environment) -> None:
    """Write table.md, demo.png and demo.json into the output folder."""
    slo, model = demo.config.slo, Path(demo.values["model"]).name
    caption = f"{model} on {on.hardware}; SGLang {on.versions.get('sglang', '-')}"
    caption += f"; seed {demo.config.seed}; TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms"
    (demo.out / "table.md").write_text(
        f"{markdown_table(phases, slo)}\n{caption}\n{arrival_line(demo.engine_state)}"
        f"{alone_warning(phases[0], slo)}\n",
        "utf-8",
    )
    plot_phases(phases, slo, demo.out / "demo.png", caption=caption)
    report = msgspec.json.encode(_report(demo, phases, on))
    (demo.out / "demo.json").write_bytes(msgspec.json.format(report, indent=1))


def _report(demo: Demo, phases: Sequence[Phase], on: Environment) -> dict[str, Any]:
    return {
        "command": [sys.executable, "-m", "conserve_sgl.bench.demo", *sys.argv[1:]],
        "server_command": demo.server.argv,
        "job_command": demo.job.argv,
        "environment": on,
        "config": demo.config,
        "summaries": {phase.name: _summary(phase, demo.config) for phase in phases},
        "engine_state": demo.engine_state,
        "phases": phases,
    }


def _summary(phase: Phase, config: DemoConfig) -> dict[str, Any]:
    online = phase.online_summary(config.slo)
    return {
        "online": online.sglang_keys(),
        "sent": online.sent,
        "cached_tokens": online.cached_tokens,
        "sender_lateness_ms": online.lateness_ms,
        "offline": phase.offline_summary(),
    }


def main(
    model: Annotated[str, typer.Option(help="Path of the model's folder.")],
    config: Annotated[Path, typer.Option(help="The demo's YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for results and logs.")],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of the server. Default: a free one.")
    ] = None,
) -> None:
    """Measure an online stream alone and beside an offline job, on one server."""
    console = Console(stderr=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        demo = Demo(load_yaml(config, DemoConfig), model, out, console, port=port)
        with stop_on_signals():
            phases = demo.run()
        write_results(demo, phases, environment())
    except ConserveError as e:
        console.print(f"demo: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    Console().print(rich_table(phases, demo.config.slo))
    console.print(arrival_line(demo.engine_state), end="")
    if warning := alone_warning(phases[0], demo.config.slo):
        console.print(warning, style="yellow", highlight=False)
    console.print(f"Written: {out}/table.md, {out}/demo.png, {out}/demo.json")


if __name__ == "__main__":
    typer.run(main)
