"""What `conserve bench` does, once its arguments are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from conserve_sgl.bench.report.plots import write_plots
from conserve_sgl.bench.report.results import (
    Result,
    SystemResult,
    by_system,
    read_folder,
    write_together,
)
from conserve_sgl.bench.report.tables import (
    Harvest,
    comparison,
    results_markdown,
    summary_line,
    terminal_table,
)
from conserve_sgl.bench.systems.benchmark import Benchmark
from conserve_sgl.bench.systems.config import BenchConfig, load_bench
from conserve_sgl.bench.systems.server import stop_on_signals
from conserve_sgl.errors import InputError

__all__ = ["UNFINISHED", "compare_folders", "run_bench"]

UNFINISHED = 3
"""Exit code of a benchmark whose time limit left runs out."""


def run_bench(
    path: Path,
    *,
    console: Console,
    model: str | None = None,
    trace: Path | None = None,
    systems: Sequence[str] = (),
    repeats: int | None = None,
    duration_s: float | None = None,
    out: Path | None = None,
    fresh: bool = False,
    time_limit_s: float = math.inf,
    pictures: bool = True,
    flags: Sequence[str] = (),
) -> bool:
    """Measure the systems of the benchmark at `path`, and report on all runs in `out`.

    Runs that `out` holds already are kept, unless `fresh`. `flags` go to every server, after the
    file's. False when runs were left out that would not have ended within `time_limit_s`.

    Raises:
        InputError: bad input; nothing was started.
        ServerError: a server did not start, died, or served nothing. Finished runs are kept.
    """
    config = _overridden(path, load_bench(path, trace=trace), systems, repeats, duration_s)
    server = msgspec.structs.replace(config.server, flags=(*config.server.flags, *flags))
    config = msgspec.structs.replace(config, server=server)
    model = model or config.model
    if model is None:
        raise InputError(path, "names no model; give --model", key="model")
    out = out or Path("out") / "bench" / path.stem
    # Read now: a fault in it must not come up after the first server has started.
    next(config.offline.backlog.bodies([config.seed], {}))
    benchmark = Benchmark(config, model, out, console)
    with stop_on_signals():
        left_out = benchmark.run_all(
            fresh=fresh,
            time_limit_s=time_limit_s,
            on_result=lambda result: _report_on(result, out, console),
        )
    for system, repeat in left_out:
        console.print(f"No time was left for {system.name}, repeat {repeat}.")
    if len(left_out) == len(config.systems) * config.repeats:
        return False
    systems_done = _in_order(config, by_system(read_folder(out)))
    (out / "table.md").write_text(results_markdown(systems_done), "utf-8")
    files = ["table.md", "runs.jsonl", "requests.jsonl"]
    files += write_plots(systems_done, out) if pictures else []
    Console().print(terminal_table(systems_done))
    console.print(f"Written to {out}: {', '.join(files)}", soft_wrap=True)
    return not left_out


def compare_folders(a: Path, b: Path) -> str:
    """Markdown that sets two results side by side.

    Raises:
        InputError: a folder without results.
    """
    first, second = by_system(read_folder(a)), by_system(read_folder(b))
    return f"A: {a}\nB: {b}\n\n{comparison(first, second)}"


def _overridden(
    path: Path,
    config: BenchConfig,
    systems: Sequence[str],
    repeats: int | None,
    duration_s: float | None,
) -> BenchConfig:
    try:
        config = config.only(systems) if systems else config
    except ValueError as e:
        raise InputError(path, str(e), key="systems") from e
    if repeats is not None:
        config = msgspec.structs.replace(config, repeats=repeats)
    if duration_s is not None:
        online = msgspec.structs.replace(config.online, duration_s=duration_s)
        config = msgspec.structs.replace(config, online=online)
    return config


def _report_on(result: Result, out: Path, console: Console) -> None:
    """A line for the run that has just ended; the files are brought up to date, pictures last."""
    results = read_folder(out)
    write_together(out, results)
    line = summary_line(SystemResult([result]), Harvest(by_system(results)))
    console.print(line, soft_wrap=True, highlight=False)


def _in_order(config: BenchConfig, systems: list[SystemResult]) -> list[SystemResult]:
    """In the order of the configuration; what an earlier run left beside them comes last."""
    names = [system.name for system in config.systems]
    return sorted(systems, key=lambda s: names.index(s.name) if s.name in names else len(names))
