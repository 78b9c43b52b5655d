"""What a run came to: `summary.json`, and the table at its end."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from conserve_sgl.client.faults import Faults
from conserve_sgl.jobs.lm_eval.online import OnlineLatency
from conserve_sgl.jobs.plan import Plan
from conserve_sgl.jobs.records import Record
from conserve_sgl.jobs.score import standard_error

__all__ = [
    "LmEvalSummary",
    "Metric",
    "Summary",
    "Tally",
    "TaskSummary",
    "print_lm_eval",
    "print_summary",
]


class TaskSummary(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one task together: its finished lines are those in `<task>.jsonl`.

    `score` is the mean over finished lines, None for a task without a score or lines;
    `cached_tokens` counts the lines whose server told.
    """

    total: int
    finished: int
    failed: int
    score: float | None
    score_stderr: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """A metric of lm-eval, None where it has no standard error."""

    value: float
    stderr: float | None


class LmEvalSummary(msgspec.Struct, frozen=True, kw_only=True):
    """`lm_eval` in `summary.json`. `run_...` is of the latest run: cached answers are not in it.

    `tasks` maps a task or group to its metrics, `acc` or `exact_match,strict-match`; it is empty
    while `partial`. `online_latency` is None where the servers' metrics do not tell.
    """

    partial: bool
    run_s: float
    run_requests: int
    run_retries: int
    run_prompt_tokens: int
    run_completion_tokens: int
    online_latency: OnlineLatency | None
    tasks: dict[str, dict[str, Metric]]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """`summary.json`. `partial` is true while a line has neither finished nor failed for good.

    `run_s`, `run_lines`, `run_prompt_tokens` and `run_completion_tokens` are of the latest run
    alone, so their quotients are true rates after a resume too.
    """

    job: str
    model: str | None
    partial: bool
    run_s: float
    run_lines: int
    run_retries: int
    run_prompt_tokens: int
    run_completion_tokens: int
    tasks: dict[str, TaskSummary]
    lm_eval: LmEvalSummary | None = None


class Tally:
    """Sums of one task's lines, of this run and of those before."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.finished = 0
        self.failed = 0
        self._scored = 0
        self._score = 0.0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0

    def add(self, record: Record) -> None:
        """Count a finished line."""
        self.finished += 1
        if record.score is not None:
            self._scored += 1
            self._score += record.score
        self._prompt_tokens += record.prompt_tokens
        self._cached_tokens += record.cached_tokens or 0
        self._completion_tokens += record.completion_tokens

    def summary(self) -> TaskSummary:
        """The sums so far."""
        mean = self._score / self._scored if self._scored else None
        return TaskSummary(
            total=self.total,
            finished=self.finished,
            failed=self.failed,
            score=mean,
            score_stderr=None if mean is None else standard_error(mean, self._scored),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
        )


def print_summary(console: Console, plan: Plan, summary: Summary, faults: Faults) -> None:
    """Print the table, the rates of this run, why lines failed, and where things are."""
    table = Table(title=f"{summary.job}{' (partial)' if summary.partial else ''}")
    table.add_column("task", overflow="fold")  # never cut: it tells rows apart
    for head in ("lines", "failed", "score", "tokens in", "cached", "tokens out"):
        table.add_column(head, justify="right")
    for name, task in summary.tasks.items():
        score = "" if task.score is None else f"{task.score:.3f} ± {task.score_stderr:.3f}"
        table.add_row(
            name,
            f"{task.finished:,}/{task.total:,}",
            f"{task.failed:,}",
            score,
            f"{task.prompt_tokens:,}",
            f"{task.cached_tokens:,}",
            f"{task.completion_tokens:,}",
        )
    console.print(table)
    rate = max(summary.run_s, 1e-9)
    say = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(
        f"this run: {summary.run_lines:,} lines in {summary.run_s:.1f} s, "
        f"{summary.run_prompt_tokens / rate:.0f} tokens/s in, "
        f"{summary.run_completion_tokens / rate:.0f} tokens/s out, "
        f"{summary.run_retries:,} retries",
        **say,
    )
    for line in faults.lines():
        console.print(f"failed: {line}", **say)
    console.print(f"results: {plan.output}", **say)
    for name, task in summary.tasks.items():
        if task.failed:
            console.print(f"failed lines: {plan.output / name}.errors.jsonl", **say)
    if summary.partial:
        console.print("not finished: run the same command again to go on", **say)


def print_lm_eval(console: Console, plan: Plan, summary: LmEvalSummary) -> None:
    """Print what lm-eval came to, its rates, and what online requests noticed of it."""
    table = Table(title=f"{plan.name}: lm-eval{' (partial)' if summary.partial else ''}")
    for head in ("task", "metric"):
        table.add_column(head, overflow="fold")
    for head in ("value", "stderr"):
        table.add_column(head, justify="right")
    for task, metrics in summary.tasks.items():
        for name, metric in metrics.items():
            stderr = "" if metric.stderr is None else f"± {metric.stderr:.4f}"
            table.add_row(task, name, f"{metric.value:.4f}", stderr)
    console.print(table)
    rate = max(summary.run_s, 1e-9)
    say = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(
        f"this run: {summary.run_requests:,} requests in {summary.run_s:.1f} s, "
        f"{summary.run_prompt_tokens / rate:.0f} tokens/s in, "
        f"{summary.run_completion_tokens / rate:.0f} tokens/s out, "
        f"{summary.run_retries:,} retries",
        **say,
    )
    console.print(f"online requests: {_online(summary.online_latency)}", **say)
    console.print(f"results: {plan.output}", **say)
    if summary.partial:
        console.print("not finished: run the same command again to go on", **say)


def _online(latency: OnlineLatency | None) -> str:
    if latency is None:
        return "not known (SGLang tells with --enable-metrics --enable-priority-scheduling)"
    before, during = latency.before, latency.during
    if during.requests == 0:
        return "none in this time"
    parts = [
        f"{name} {_ms(old)} -> {_ms(new)}"
        for name, old, new in (
            ("TTFT mean", before.ttft_mean_ms, during.ttft_mean_ms),
            ("p99", before.ttft_p99_ms, during.ttft_p99_ms),
            ("TPOT mean", before.tpot_mean_ms, during.tpot_mean_ms),
            ("p99", before.tpot_p99_ms, during.tpot_p99_ms),
        )
    ]
    return f"{during.requests:,} in this time (before: {before.requests:,}), {', '.join(parts)}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
