"""What `conserve simulate` does, once its arguments are read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from conserve_sgl.bench.report.plots import write_plots
from conserve_sgl.bench.report.results import run_folder, write_run, write_together
from conserve_sgl.simulate.config import load_simulation
from conserve_sgl.simulate.plots import plot_dial
from conserve_sgl.simulate.report import planning, simulation_markdown, terminal_table
from conserve_sgl.simulate.simulation import Simulated, Simulator

__all__ = ["run_simulation"]


def run_simulation(
    path: Path,
    *,
    console: Console,
    out: Path | None = None,
    device: str | None = None,
    conserve: Path | None = None,
    trace: Path | None = None,
    duration_s: float | None = None,
    systems: Sequence[str] = (),
    changes: Mapping[str, str] | None = None,
) -> None:
    """Run the simulation at `path` and write what came out into `out`; see `load_simulation`.

    Raises:
        InputError: bad input; nothing was written.
    """
    simulation = load_simulation(
        path,
        device=device,
        conserve=conserve,
        trace=trace,
        duration_s=duration_s,
        systems=systems,
        changes=changes,
    )
    out = out or Path("out") / "simulate" / path.stem
    simulator = Simulator(simulation)
    simulated = _run_all(simulator, console)
    files = _write(simulator, simulated, out)
    Console().print(terminal_table(simulated))
    for sentence in dict.fromkeys(s for one in simulated for s in one.ceiling.unmet):
        console.print(f"conserve: {sentence}", style="yellow", soft_wrap=True, highlight=False)
    Console().print(planning(simulated), soft_wrap=True, highlight=False, end="")
    console.print(f"Written to {out}: {', '.join(files)}", soft_wrap=True, highlight=False)


def _run_all(simulator: Simulator, console: Console) -> list[Simulated]:
    runs = simulator.simulation.runs
    load = simulator.load
    each_s = load.duration_s + load.lead_s
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} s of load"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    simulated = []
    with Progress(*columns, console=console, refresh_per_second=4, transient=True) as progress:
        task = progress.add_task("", total=each_s * len(runs))
        for number, run in enumerate(runs):
            title = f"{number + 1}/{len(runs)} {run.system.name}"
            progress.update(task, description=title, completed=number * each_s)

            def show(now_s: float, done_s: float = number * each_s) -> None:
                spent_s = min(max(now_s + load.lead_s, 0.0), each_s)
                progress.update(task, completed=done_s + spent_s)

            simulated.append(simulator.run(run, show))
    return simulated


def _write(simulator: Simulator, simulated: Sequence[Simulated], out: Path) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "runs", ignore_errors=True)  # of an earlier simulation: made in seconds
    for one in simulated:
        folder = run_folder(out, one.system.name, 1)
        folder.mkdir(parents=True)
        write_run(folder, one.result)
    ceilings = {one.system.name: one.ceiling.tok_s for one in simulated}
    write_together(out, [one.result for one in simulated], ceilings)
    text = simulation_markdown(simulator.simulation, simulated)
    (out / "table.md").write_text(text, "utf-8")
    main = [one.system for one in simulated if not one.run.on_dial]
    files = ["table.md", "runs.jsonl", "requests.jsonl", *write_plots(main, out)]
    if plot_dial(simulated, out / "dial.png"):
        files.append("dial.png")
    return files
