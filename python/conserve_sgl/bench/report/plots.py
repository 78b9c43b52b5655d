"""Pictures of a benchmark's results.

latency_cdf.png    TTFT and TPOT of every system, as cumulative distributions
over_time.png      each system's TTFT, TPOT and tokens a second over the stream
tradeoff.png       offline work harvested against online latency
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.metrics import attained, tpot_s, ttft_s
from conserve_sgl.bench.report.offline import token_rates
from conserve_sgl.bench.report.results import SystemResult
from conserve_sgl.bench.report.tables import Harvest, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

__all__ = ["plot_over_time", "write_plots"]

Latency = Callable[[RequestRecord], float | None]

# Stock SGLang alone is black, conserve is blue, in lighter shades where it is there several times.
_COLORS = ("#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#999999")
_BLUES = ("#08519c", "#4292c6", "#9ecae1", "#0aa0a0", "#41b6c4", "#7fcdbb")
_BASELINE = "#222222"
_ONLINE, _MISS, _INPUT, _OUTPUT = "#2166ac", "#b2182b", "#fddbc7", "#ef8a62"
_STEP_S = 2.0
_COLUMNS = 3


def write_plots(systems: Sequence[SystemResult], out: Path) -> list[str]:
    """Write the pictures that the results allow into `out`; their names."""
    written = []
    with_online = [s for s in systems if s.online is not None and s.online.completed]
    if with_online:
        written += [_save(_latency_cdfs(with_online), out / "latency_cdf.png")]
        written += [_save(_over_time(with_online), out / "over_time.png")]
    harvest = Harvest(systems)
    # Without an online-only run there is no latency to set the others' against.
    if harvest.online_only is not None and any(s.system.load == "both" for s in with_online):
        written += [_save(_tradeoff(with_online, harvest), out / "tradeoff.png")]
    return written


def plot_over_time(systems: Sequence[SystemResult], path: Path) -> None:
    """Write the picture of each system over the stream."""
    _save(_over_time(systems), path)


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path)
    return path.name


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def _plain_log(axis: XAxis | YAxis, form: str) -> None:
    """Plain numbers at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(form)


def _colors(systems: Sequence[SystemResult]) -> dict[str, str]:
    """One for each system, by name."""
    others, blues = itertools.cycle(_COLORS), itertools.cycle(_BLUES)
    return {
        system.name: _BASELINE
        if system.system.is_online_baseline
        else next(blues if system.system.kind == "conserve" else others)
        for system in systems
    }


def _caption(systems: Sequence[SystemResult]) -> str:
    run = systems[0].results[0].run
    version, slo = run.environment.versions.get("sglang", "-"), run.slo
    return (
        f"{Path(run.model).name} on {run.environment.hardware}; SGLang {version}; "
        f"{run.window_s:g} s, seed {run.seed}; TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms"
    )


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")


def _say_caption(figure: Figure, systems: Sequence[SystemResult]) -> None:
    figure.supxlabel(_caption(systems), fontsize=8, color="0.35", x=0.01, ha="left")


# -------------------------------------------------------------------------- CDFs


def _latency_cdfs(systems: Sequence[SystemResult]) -> Figure:
    figure = _figure(11, 5)
    colors = _colors(systems)
    slo = systems[0].slo
    for axis, (name, latency, objective_ms) in zip(
        figure.subplots(1, 2, sharey=True),
        (("TTFT", ttft_s, slo.ttft_ms), ("TPOT", tpot_s, slo.tpot_ms)),
        strict=True,
    ):
        for system in systems:
            _cdf(axis, system, latency, colors[system.name])
        axis.axvline(objective_ms, color="0.4", ls=":", lw=1.2)
        axis.annotate(
            f"objective {objective_ms:g} ms",
            (objective_ms, 0.5),
            xytext=(2, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            va="center",
            fontsize=8,
            color="0.35",
        )
        axis.set(xscale="log", ylim=(0, 1.01), xlabel=f"{name} (ms)")
        _plain_log(axis.xaxis, "{x:,.0f}")
        _bare(axis)
        if name == "TTFT":
            axis.set_ylabel("share of requests sent")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    _title(figure, "Latency of online requests")
    _say_caption(figure, systems)
    return figure


def _cdf(axis: Axes, system: SystemResult, latency_s: Latency, color: str) -> None:
    """Over all requests sent: a curve that ends below 1 has requests that never completed."""
    records = [record for result in system.results for record in result.online]
    found = [1000 * v for r in records if r.completed and (v := latency_s(r)) is not None]
    # A single token has no TPOT, and is no failure either.
    total = len(found) + sum(not record.completed for record in records)
    x = np.sort(found)
    y = np.arange(1, len(x) + 1) / max(total, 1)
    alone = system.system.load == "online"
    axis.step(
        np.concatenate(([x[0]], x)) if len(x) else [],
        np.concatenate(([0], y)) if len(x) else [],
        where="post",
        color=color,
        lw=2.4 if system.system.kind == "conserve" or alone else 1.6,
        ls="--" if alone else "-",
        label=system.name,
    )


# --------------------------------------------------------------------- over time


def _over_time(systems: Sequence[SystemResult]) -> Figure:
    """Three panels a system, `_COLUMNS` systems side by side, the same scales everywhere."""
    bands = -(-len(systems) // _COLUMNS)
    columns = min(len(systems), _COLUMNS)
    figure = _figure(1 + 4.6 * columns, 1 + 6 * bands)
    grid = figure.subplots(3 * bands, columns, squeeze=False, sharex=True)
    limits = [_limits(systems, ttft_s), _limits(systems, tpot_s), _most_tokens(systems)]
    places = [grid[3 * band : 3 * band + 3, c] for band in range(bands) for c in range(columns)]
    for place, system in zip(places, systems, strict=False):
        _column(place, system, limits)
    for place in places[len(systems) :]:
        for axis in place:
            axis.set_axis_off()
    for row, axis in enumerate(grid[:, 0]):
        axis.set_ylabel(("TTFT (ms)", "TPOT (ms)", "tokens/s")[row % 3])
    _time_legend(figure, places[0], _caption(systems))
    _title(figure, "Over the stream")
    return figure


def _column(axes: Sequence[Axes], system: SystemResult, limits: list) -> None:
    result = system.results[0]
    slo = system.slo
    met = f"{percent(system.online.slo_attainment)} within objectives"
    done = (
        "no offline work"
        if system.offline is None
        else f"{system.offline.total_tokens_per_s:,.0f} offline tok/s"
    )
    axes[0].set_title(system.name, fontsize=11, fontweight="bold", loc="left", pad=18)
    axes[0].text(0, 1.03, f"{met}; {done}", transform=axes[0].transAxes, fontsize=8.5)
    for axis, latency, objective_ms, (low, high) in (
        (axes[0], ttft_s, slo.ttft_ms, limits[0]),
        (axes[1], tpot_s, slo.tpot_ms, limits[1]),
    ):
        _scatter(axis, result.online, latency, system)
        axis.axhline(objective_ms, color="0.3", ls="--", lw=1, label="objective")
        axis.set(yscale="log", ylim=(low, high))
        _plain_log(axis.yaxis, "{x:,.0f}")
    for axis in axes[:2]:
        _mark(axis, 0.0, "|", "0.25", [record.due_s for record in result.online], "arrival")
    lost = [record.due_s for record in result.online if not record.completed]
    _mark(axes[0], 0.97, "v", _MISS, lost, "never completed")
    _tokens(axes[2], system)
    axes[2].set(xlim=(0, result.run.window_s), ylim=(0, limits[2]), xlabel="seconds")
    for axis in axes:
        _bare(axis)


def _mark(
    axis: Axes, height: float, marker: str, color: str, times_s: Sequence[float], label: str
) -> None:
    """Marks at `height`, 0 being the bottom of the panel and 1 its top, whatever its scale."""
    axis.plot(
        times_s,
        [height] * len(times_s),
        marker,
        color=color,
        ms=6,
        mew=1 if marker == "|" else 0,
        transform=axis.get_xaxis_transform(),
        clip_on=False,
        in_layout=False,  # else the layout tries to make room for them, and fails
        label=label,
    )


def _scatter(
    axis: Axes, records: Sequence[RequestRecord], latency_s: Latency, system: SystemResult
) -> None:
    for met, marker, color, label in (
        (True, "o", _ONLINE, "request within objectives"),
        (False, "X", _MISS, "request that missed one"),
    ):
        points = [
            (record.due_s, 1000 * value)
            for record in records
            if attained(record, system.slo) == met and (value := latency_s(record)) is not None
        ]
        x, y = zip(*points, strict=True) if points else ((), ())
        axis.scatter(x, y, s=18, marker=marker, color=color, alpha=0.8, lw=0, label=label)


def _tokens(axis: Axes, system: SystemResult) -> None:
    edges, layers = _layers(system)
    axis.stackplot(
        edges,
        *(np.append(layer, layer[-1]) for layer in layers),  # the last step has a width too
        step="post",
        colors=[_ONLINE, _OUTPUT, _INPUT],
        labels=["online tokens", "offline output", "offline input computed"],
    )


def _layers(system: SystemResult) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Edges in seconds, and in each interval tokens/s: online, offline output, offline input."""
    result = system.results[0]
    window_s = result.run.window_s
    edges = np.linspace(0, window_s, max(2, round(window_s / _STEP_S) + 1))
    online, offline = token_rates(edges, result.online), result.offline_rates(edges)
    return edges, (online.computed + online.output, offline.output, offline.computed)


def _most_tokens(systems: Sequence[SystemResult]) -> float:
    return 1.05 * max(1.0, *(float(sum(_layers(system)[1]).max()) for system in systems))


def _limits(systems: Sequence[SystemResult], latency_s: Latency) -> tuple[float, float]:
    """Of an axis that holds every latency, and the objectives, with room around them."""
    slo = systems[0].slo
    objective_ms = slo.ttft_ms if latency_s is ttft_s else slo.tpot_ms
    found = [
        1000 * value
        for system in systems
        for record in system.results[0].online
        if (value := latency_s(record))
    ]
    return min([objective_ms, *found]) / 1.5, max([objective_ms, *found]) * 1.5


def _time_legend(figure: Figure, axes: Sequence[Axes], caption: str) -> None:
    found: dict[str, object] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
        title=caption,
        title_fontsize=8,
    )


# --------------------------------------------------------------------- trade-off


def _tradeoff(systems: Sequence[SystemResult], harvest: Harvest) -> Figure:
    """A point a system: right is slower than online-only, up is more offline work done."""
    figure = _figure(11, 5)
    colors = _colors(systems)
    base = harvest.online_only.online
    beside = [s for s in systems if s.system.load == "both"]
    for axis, (name, of) in zip(
        figure.subplots(1, 2, sharey=True),
        (("TTFT", lambda o: o.ttft_ms.p99), ("TPOT", lambda o: o.tpot_ms.p99)),
        strict=True,
    ):
        points = {s.name: (of(s.online) / of(base), _harvested(s, harvest)) for s in beside}
        _dial(axis, beside, points)
        for system in beside:
            _point(axis, system, points[system.name], colors[system.name])
        axis.axvline(1, color="0.4", ls=":", lw=1.2)
        axis.set(xscale="log", xlabel=f"P99 {name} over online-only's")
        _plain_log(axis.xaxis, "{x:g}x")
        axis.set_ylim(bottom=0)
        _bare(axis)
    if harvest.idle_tokens_per_s is None:
        figure.axes[0].set_ylabel("offline tokens/s")
    else:
        figure.axes[0].set_ylabel("harvest efficiency (%)")
        for axis in figure.axes:
            axis.axhline(100, color="0.4", ls=":", lw=1.2)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    title = "system (SLO met)"
    figure.legend(
        handles, labels, title=title, loc="outside right center", frameon=False, fontsize=9
    )
    _title(figure, "Offline work against online latency (up and left is better)")
    _say_caption(figure, systems)
    return figure


def _harvested(system: SystemResult, harvest: Harvest) -> float:
    efficiency = harvest.efficiency(system)
    return system.offline.total_tokens_per_s if efficiency is None else 100 * efficiency


def _dial(
    axis: Axes, systems: Sequence[SystemResult], points: dict[str, tuple[float, float]]
) -> None:
    """Join the systems that differ in one dial, in the order of the file."""
    turned = [points[s.name] for s in systems if s.system.dial is not None]
    if len(turned) > 1:
        axis.plot(*zip(*turned, strict=True), color=_BLUES[0], lw=1.2, alpha=0.6)


def _point(axis: Axes, system: SystemResult, at: tuple[float, float], color: str) -> None:
    conserve = system.system.kind == "conserve"
    label = f"{system.name} ({100 * system.online.slo_attainment:.0f} %)"
    axis.scatter(*at, s=70, marker="o" if conserve else "s", color=color, label=label, zorder=3)
    if system.system.dial is not None:
        offset = {"xytext": (7, 5), "textcoords": "offset points"}
        axis.annotate(system.system.dial, at, fontsize=8, color=color, **offset)
