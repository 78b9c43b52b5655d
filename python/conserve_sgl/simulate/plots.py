"""The dial as a picture: offline work and latency over the objective, beside the ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conserve_sgl.simulate.simulation import Simulated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_dial"]

_BLUE, _GREY, _RED = "#08519c", "0.45", "#b2182b"


def plot_dial(simulated: Sequence[Simulated], path: Path) -> bool:
    """Write a PNG of the settings of the dial, if there are two or more; whether it did."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state

    points = [s for s in simulated if s.run.on_dial and s.system.online is not None]
    points.sort(key=lambda s: s.result.run.slo.tpot_ms)
    if len(points) < 2:
        return False
    figure = Figure(figsize=(10.5, 4.2), dpi=130, layout="constrained")
    work, latency = figure.subplots(1, 2)
    x = [s.result.run.slo.tpot_ms for s in points]
    _work(work, x, points)
    _latency(latency, x, points)
    for axis in (work, latency):
        axis.set_xscale("log")
        axis.set_xticks(x, [f"{ms:g}" for ms in x])
        axis.minorticks_off()
        axis.set_xlabel("objective for the time per token (ms)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return True


def _work(axis: Axes, x: Sequence[float], points: Sequence[Simulated]) -> None:
    axis.plot(x, [p.ceiling.tok_s for p in points], "--", color=_GREY, label="ceiling")
    rates = [p.system.offline.total_tokens_per_s for p in points]
    axis.plot(x, rates, "o-", color=_BLUE, label="conserve")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("offline tokens/s")


def _latency(axis: Axes, x: Sequence[float], points: Sequence[Simulated]) -> None:
    axis.plot(x, x, "--", color=_GREY, label="objective")
    tpots = [p.system.online.tpot_ms.p99 for p in points]
    gaps = [p.system.online.itl_ms.p99 for p in points]
    axis.plot(x, tpots, "o-", color=_BLUE, label="TPOT P99")
    axis.plot(x, gaps, "s-", color=_RED, ms=4, label="ITL P99")
    axis.set_yscale("log")
    axis.set_ylabel("ms")
