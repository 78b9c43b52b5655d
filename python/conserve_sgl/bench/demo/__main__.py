"""The demo: one server, an online stream alone, then the same stream beside an offline job.

    python -m conserve_sgl.bench.demo --model PATH --config configs/bench/demo.yaml --out out/demo

Writes `table.md`, `demo.png`, `demo.json` and the logs of the server and the job into the output
folder, and stops what it started, however it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from conserve_sgl.bench.demo.config import DemoConfig
from conserve_sgl.bench.demo.phases import ARRIVALS, Demo
from conserve_sgl.bench.report.plots import plot_over_time
from conserve_sgl.bench.report.results import Result, by_system
from conserve_sgl.bench.report.tables import plain_markdown, side_by_side
from conserve_sgl.bench.systems.server import stop_on_signals
from conserve_sgl.errors import ConserveError
from conserve_sgl.strict_yaml import load_yaml

__all__ = ["main"]


def alone_warning(alone: Result) -> str:
    """What to know before the figures are read; empty when online work alone met the objectives."""
    online = alone.online_summary()
    missed = online.sent - online.good
    if not missed:
        return ""
    return (
        f"{missed} of {online.sent} online requests missed an objective with no offline work "
        "beside them: something else runs on this machine, or it is too slow for them. The "
        "figures beside the job do not show what offline work costs."
    )


def arrival_line(last: Result) -> str:
    """How long an online arrival took from the tokenizer process to conserve's scheduler."""
    told = last.run.counters_after
    if ARRIVALS not in told:
        return ""
    return (
        f"Arrival to scheduler, the step that runs included: P50 {told['arrival_ms.p50']:.1f} ms, "
        f"P99 {told['arrival_ms.p99']:.1f} ms over {told[ARRIVALS]} arrivals.\n"
    )


def write_results(demo: Demo, phases: Sequence[Result]) -> None:
    """Write table.md, demo.png and demo.json into the output folder."""
    systems = by_system(phases)
    (demo.out / "table.md").write_text(
        f"{plain_markdown(systems)}{arrival_line(phases[-1])}{alone_warning(phases[0])}\n", "utf-8"
    )
    plot_over_time(systems, demo.out / "demo.png")
    report = msgspec.json.encode(_report(demo, phases))
    (demo.out / "demo.json").write_bytes(msgspec.json.format(report, indent=1))


def _report(demo: Demo, phases: Sequence[Result]) -> dict[str, Any]:
    last = phases[-1].run
    return {
        "command": last.command,
        "server_command": last.server_command,
        "job_command": demo.job.argv,
        "environment": last.environment,
        "config": demo.config,
        "summaries": {phase.run.system.name: _summary(phase) for phase in phases},
        "engine_state": last.counters_after,
        "phases": [_phase(phase) for phase in phases],
    }


def _summary(phase: Result) -> dict[str, Any]:
    online = phase.online_summary()
    return {
        "online": online.sglang_keys(),
        "sent": online.sent,
        "cached_tokens": online.cached_tokens,
        "sender_lateness_ms": online.lateness_ms,
        "offline": phase.offline_summary(),
    }


def _phase(phase: Result) -> dict[str, Any]:
    run = phase.run
    return {
        "name": run.system.name,
        "started_unix_s": run.started_unix_s,
        "window_s": run.window_s,
        "duration_s": run.duration_s,
        "online": phase.online,
        "offline": phase.job,
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

    def warn(alone: Result) -> None:
        if warning := alone_warning(alone):
            console.print(warning, style="yellow", highlight=False)

    try:
        out.mkdir(parents=True, exist_ok=True)
        demo = Demo(load_yaml(config, DemoConfig), model, out, console, port=port)
        with stop_on_signals():
            phases = demo.run(on_alone=warn)
        write_results(demo, phases)
    except ConserveError as e:
        console.print(f"demo: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    Console().print(side_by_side(by_system(phases)))
    console.print(arrival_line(phases[-1]), end="")
    warn(phases[0])
    console.print(f"Written: {out}/table.md, {out}/demo.png, {out}/demo.json")


if __name__ == "__main__":
    typer.run(main)
