"""What is printed when a job ends, on a terminal that is narrow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from conserve_sgl.jobs.summary import LmEvalSummary, Metric, print_lm_eval


def test_names_of_tasks_and_metrics_are_never_cut():
    names = [
        f"leaderboard_math_{part}_hard_with_a_name_that_goes_on" for part in ("algebra", "geo")
    ]
    metrics = {"exact_match,flexible-extract-and-more": Metric(value=0.5, stderr=0.01)}
    summary = LmEvalSummary(
        partial=False,
        run_s=1.0,
        run_requests=2,
        run_retries=0,
        run_prompt_tokens=3,
        run_completion_tokens=4,
        online_latency=None,
        tasks=dict.fromkeys(names, metrics),
    )
    console = Console(width=80)
    with console.capture() as capture:
        print_lm_eval(console, SimpleNamespace(name="job", output=Path("out")), summary)

    rows = [line.split("│") for line in capture.get().splitlines() if "│" in line]
    first, second = ("".join(row[i].strip() for row in rows) for i in (1, 2))
    assert all(name in first for name in names)
    assert second.count(next(iter(metrics))) == 2
