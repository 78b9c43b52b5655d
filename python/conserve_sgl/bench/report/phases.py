"""Tables and pictures of measured phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from rich.table import Table

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.metrics import (
    OnlineSummary,
    Slo,
    attained,
    summarize,
    tpot_s,
    ttft_s,
)
from conserve_sgl.bench.report.offline import (
    OfflineRecord,
    OfflineSummary,
    rates,
    summarize_offline,
    token_rates,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Phase", "markdown_table", "plot_phases", "rich_table"]


class Phase(msgspec.Struct, frozen=True):
    """One stretch of measuring: an online stream, with or without offline work beside it.

    `window_s` is the planned length of the stream, over which offline work is counted: equal
    for every phase that is compared. `duration_s` also holds the draining of the last requests.
    """

    name: str
    started_unix_s: float
    window_s: float
    duration_s: float
    online: tuple[RequestRecord, ...]
    offline: tuple[OfflineRecord, ...] | None

    def online_summary(self, slo: Slo) -> OnlineSummary:
        return summarize(self.online, self.duration_s, slo)

    def offline_summary(self) -> OfflineSummary | None:
        """None when the phase had no offline work."""
        if self.offline is None:
            return None
        end_unix_s = self.started_unix_s + self.window_s
        return summarize_offline(self.offline, self.started_unix_s, end_unix_s)


_COLUMNS = (
    "",
    "requests",
    "TTFT P50",
    "TTFT P99",
    "TPOT P50",
    "TPOT P99",
    "SLO met",
    "offline in tok/s",
    "offline out tok/s",
    "offline tok/s",
)


def markdown_table(phases: Sequence[Phase], slo: Slo) -> str:
    """One row for each phase; offline input is what was computed, without cache hits."""
    lines = [_COLUMNS, ("---", *["---:"] * (len(_COLUMNS) - 1))]
    lines += [_row(phase, slo) for phase in phases]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rich_table(phases: Sequence[Phase], slo: Slo) -> Table:
    """The same figures for a terminal, which is narrow: one column for each phase."""
    header, *rows = zip(_COLUMNS, *(_row(phase, slo) for phase in phases), strict=True)
    table = Table(title=f"Objectives: TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms")
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _row(phase: Phase, slo: Slo) -> tuple[str, ...]:
    online, offline = phase.online_summary(slo), phase.offline_summary()
    return (
        phase.name,
        f"{online.completed}/{online.sent}",
        _number(online.ttft_ms.median, " ms"),
        _number(online.ttft_ms.p99, " ms"),
        _number(online.tpot_ms.median, " ms"),
        _number(online.tpot_ms.p99, " ms"),
        _number(100 * online.slo_attainment, " %"),
        _number(None if offline is None else offline.input_tokens_per_s),
        _number(None if offline is None else offline.output_tokens_per_s),
        _number(None if offline is None else offline.total_tokens_per_s),
    )


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None or np.isnan(value) else f"{value:,.0f}{unit}"


Latency = Callable[[RequestRecord], float | None]
_ONLINE, _MISS, _INPUT, _OUTPUT = "#2166ac", "#b2182b", "#fddbc7", "#ef8a62"


def plot_phases(phases: Sequence[Phase], slo: Slo, path: Path, *, caption: str = "") -> None:
    """Write a PNG: TTFT, TPOT and tokens a second over time, one column for each phase."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(phases), 8), dpi=130, layout="constrained")
    axes = figure.subplots(
        3, len(phases), sharex=True, sharey="row", squeeze=False, height_ratios=[1.2, 1, 1.2]
    )
    for column, phase in zip(axes.T, phases, strict=True):
        _title(column[0], phase, slo)
        _plot_latency(column[0], phase, slo, ttft_s, slo.ttft_ms)
        _mark(column[0], 0.97, "X", _MISS, [r.due_s for r in phase.online if not r.chunk_times_s])
        _plot_latency(column[1], phase, slo, tpot_s, slo.tpot_ms)
        _plot_tokens(column[2], phase)
        column[2].set_xlabel("seconds since the stream began")
    for axis, label in zip(axes[:, 0], ("TTFT (ms)", "TPOT (ms)", "tokens/s"), strict=True):
        axis.set_ylabel(label)
    _scale(axes[0, 0], _limits(phases, ttft_s, slo.ttft_ms))
    _scale(axes[1, 0], _limits(phases, tpot_s, slo.tpot_ms))
    for axis in axes.flat:
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [axes[row, 0].get_legend_handles_labels() for row in (0, 2)]
    figure.legend(
        *(first + second for first, second in zip(*handles, strict=True)),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
        title=caption,
        title_fontsize=8,
    )
    figure.savefig(path)


def _title(axis: Axes, phase: Phase, slo: Slo) -> None:
    online, offline = phase.online_summary(slo), phase.offline_summary()
    met = f"{_number(100 * online.slo_attainment, ' %')} of online requests within objectives"
    harvest = "no offline work"
    if offline is not None:
        harvest = f"offline {_number(offline.total_tokens_per_s)} tok/s"
    axis.set_title(f"{phase.name}\n", fontsize=13, fontweight="bold")
    axis.text(0.5, 1.02, f"{met}; {harvest}", transform=axis.transAxes, ha="center")


def _plot_latency(
    axis: Axes, phase: Phase, slo: Slo, latency_s: Latency, objective_ms: float
) -> None:
    for met, marker, color, label in (
        (True, "o", _ONLINE, "request within both objectives"),
        (False, "X", _MISS, "request that missed one, or failed"),
    ):
        points = [
            (record.due_s, 1000 * value)
            for record in phase.online
            if attained(record, slo) is met and (value := latency_s(record)) is not None
        ]
        x, y = zip(*points, strict=True) if points else ((), ())
        axis.scatter(x, y, s=26, marker=marker, color=color, alpha=0.8, lw=0, label=label)
    axis.axhline(objective_ms, color="0.3", ls="--", lw=1, label="objective")
    _mark(axis, 0.0, "|", "0.25", [record.due_s for record in phase.online], label="arrival")


def _mark(
    axis: Axes, height: float, marker: str, color: str, times_s: Sequence[float], label: str = ""
) -> None:
    """Marks at `height`, 0 being the bottom of the panel and 1 its top, whatever its scale."""
    axis.plot(
        times_s,
        [height] * len(times_s),
        marker,
        color=color,
        ms=8 if marker == "|" else 6,
        mew=1 if marker == "|" else 0,
        transform=axis.get_xaxis_transform(),
        clip_on=False,
        in_layout=False,  # else the layout tries to make room for them, and fails
        label=label,
    )


def _limits(
    phases: Sequence[Phase], latency_s: Latency, objective_ms: float
) -> tuple[float, float]:
    """Of an axis that holds every latency and the objective, with room around them."""
    records = [record for phase in phases for record in phase.online]
    found = [1000 * value for record in records if (value := latency_s(record))]
    return min([objective_ms, *found]) / 1.8, max([objective_ms, *found]) * 1.8


def _scale(axis: Axes, limits: tuple[float, float]) -> None:
    """Logarithmic, with plain numbers on it."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_ylim(limits)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:,g}")


def _plot_tokens(axis: Axes, phase: Phase) -> None:
    edges = np.linspace(0, phase.window_s, max(2, round(phase.window_s / 2) + 1))
    unix = edges + phase.started_unix_s
    offline = phase.offline or ()
    online = token_rates(edges, phase.online)
    layers = (
        online.computed + online.output,
        rates(unix, offline, "completion_tokens"),
        rates(unix, offline, "computed_tokens"),
    )
    axis.stackplot(
        edges,
        *(np.append(layer, layer[-1]) for layer in layers),  # the last step has a width too
        step="post",
        colors=[_ONLINE, _OUTPUT, _INPUT],
        labels=["online", "offline output", "offline input"],
    )
    axis.set_xlim(0, phase.window_s)
