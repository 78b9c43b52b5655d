"""A profile for a person: what a step costs, how far off the model is, and a picture of both."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from conserve_sgl.policy.latency import (
    Coefficients,
    ErrorQuantiles,
    LatencyModel,
    StepKind,
    StepSample,
)
from conserve_sgl.profile.steps import held_out
from conserve_sgl.profile.store import Profile

__all__ = ["plot_profile", "print_check", "print_profile"]

_MEANING = {
    "step": "a step",
    "prefill": "a step with a prompt",
    "prompt": "a prompt",
    "token": "a prompt token",
    "early_token": "a token below the knee, on top",
    "wide_token": "a token beyond 256, on top",
    "wider_token": "a token beyond 512, on top",
    "widest_token": "a token beyond 1,024, on top",
    "attention": "a million query-key pairs of a prompt",
    "decode": "a step with decode rows",
    "batch": "a step with two decode rows or more, on top",
    "row": "a decode row",
    "early_row": "a decode row below the knee, on top",
    "context": "a thousand tokens of KV that decode reads",
    "mixed": "a step with prompts and rows, on top",
    "mixed_row": "a decode row beside a prompt, on top",
    "mixed_context": "a thousand tokens of KV of such a row, on top",
}
_UNITS = {"attention": 1e6, "context": 1e3, "mixed_context": 1e3}
_COLOURS = {StepKind.PREFILL: "#1f77b4", StepKind.DECODE: "#d62728", StepKind.MIXED: "#7f7f7f"}


def print_profile(console: Console, profile: Profile, path: Path) -> None:
    """Write identity, costs and errors of `profile`, which is stored at `path`."""
    model = profile.model()
    console.print(f"{path}", markup=False, highlight=False, soft_wrap=True)
    facts = {**msgspec.structs.asdict(profile.identity), "measured_at": profile.measured_at}
    for name, value in facts.items():
        console.print(f"  {name:<18} {value}", markup=False, highlight=False, soft_wrap=True)
    console.print(_costs(model.coefficients))
    console.print(_errors(model))


def print_check(console: Console, profile: Profile, samples: list[StepSample]) -> None:
    """Write how well `samples`, steps of a log, are predicted by what was measured before them."""
    for title, learn in (("By the profile alone", False), ("Refitted as it goes", True)):
        checked = held_out(profile.model(), samples, learn=learn)
        rows = [(kind.name.lower(), errors) for kind, errors in checked.errors.items()]
        table = _error_table(title, [*rows, ("all", checked.all)])
        table.caption = f"{checked.under_upper:.0%} of the steps stayed under the upper quantile"
        console.print(table)


def _costs(coefficients: Coefficients) -> Table:
    table = Table("cost", "of", title="What a step costs")
    table.add_column("ms", justify="right")
    for name, seconds in msgspec.structs.asdict(coefficients).items():
        cost_ms = seconds * _UNITS.get(name, 1) * 1e3
        table.add_row(name, _MEANING[name], f"{cost_ms:.4g}" if cost_ms else "-")
    return table


def _errors(model: LatencyModel) -> Table:
    rows = [(kind.name.lower(), model.errors(kind)) for kind in StepKind]
    return _error_table("Error of predictions for steps that the fit did not see", rows)


def _error_table(title: str, rows: list[tuple[str, ErrorQuantiles]]) -> Table:
    table = Table("steps", title=title)
    for column in ("measured", "median", "P95", "bias", "upper quantile"):
        table.add_column(column, justify="right")
    for name, e in rows:
        cells = [f"{e.median:.1%}", f"{e.p95:.1%}", f"{e.bias:+.1%}", f"{e.upper:+.1%}"]
        table.add_row(name, str(e.steps), *(cells if e.steps else "----"))
    return table


def plot_profile(profile: Profile, path: Path) -> None:
    """Write a PNG of the predicted against the measured time of every step of `profile`."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state

    model = profile.model()
    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    axes = figure.add_subplot()
    for kind in StepKind:
        steps = [s for s in profile.samples if s.work.kind is kind]
        measured_ms = [s.seconds * 1e3 for s in steps]
        predicted_ms = [model.predict_s(s.work) * 1e3 for s in steps]
        label = f"{kind.name.lower()} ({len(steps)})"
        axes.scatter(measured_ms, predicted_ms, s=18, alpha=0.7, label=label, c=_COLOURS[kind])
    times_ms = [s.seconds * 1e3 for s in profile.samples]
    ends = (min(times_ms) * 0.8, max(times_ms) * 1.25)
    axes.plot(ends, ends, color="black", linewidth=1)
    low, high = [[end * share for end in ends] for share in (0.85, 1.15)]
    axes.fill_between(ends, low, high, color="black", alpha=0.08, label="within 15%")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set(xlabel="measured, ms", ylabel="predicted, ms")
    axes.set_title(f"{Path(profile.identity.model).name} on {profile.identity.device}", wrap=True)
    axes.legend()
    axes.grid(which="both", alpha=0.2)
    figure.savefig(path, dpi=120)
