"""Benchmark results as Markdown and as terminal tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from conserve_sgl.bench.load.record import UNFINISHED
from conserve_sgl.bench.report.results import Interval, SystemResult

__all__ = [
    "Harvest",
    "comparison",
    "markdown",
    "ms",
    "percent",
    "plain_markdown",
    "results_markdown",
    "row",
    "side_by_side",
    "summary_line",
    "terminal_table",
]


class Harvest:
    """What co-serving is measured against: stock SGLang with either load alone.

    Efficiency = offline tokens/s while co-serving / (offline tokens/s alone x idle share of the
    online-only run), tokens being prompt tokens computed and tokens generated. None where one of
    the two baselines was not run.
    """

    def __init__(self, systems: Sequence[SystemResult]) -> None:
        self.online_only = next((s for s in systems if s.system.is_online_baseline), None)
        self.offline_only = next((s for s in systems if s.system.is_offline_ceiling), None)

    @property
    def idle_tokens_per_s(self) -> float | None:
        """What the idle time of the online-only run is worth."""
        idle = None if self.online_only is None else self.online_only.idle_share
        if idle is None or self.offline_only is None or self.offline_only.offline is None:
            return None
        return idle * self.offline_only.offline.total_tokens_per_s

    def share(self, system: SystemResult) -> float | None:
        """Offline tokens/s over those of the offline-only run; None for that run itself."""
        alone = None if self.offline_only is None else self.offline_only.offline
        if system.offline is None or system.system.load != "both" or alone is None:
            return None
        return system.offline.total_tokens_per_s / (alone.total_tokens_per_s or float("nan"))

    def efficiency(self, system: SystemResult) -> float | None:
        if system.offline is None or not self.idle_tokens_per_s or system.system.load != "both":
            return None
        return system.offline.total_tokens_per_s / self.idle_tokens_per_s


Row = Mapping[str, str]

_EXACT_MS = 20.0
"""Below it a decimal is shown: a GPU's steps differ by tenths of a millisecond."""


def row(system: SystemResult, harvest: Harvest) -> Row:
    """The figures of a system, by the names of their columns."""
    online, offline = system.online, system.offline
    return {
        "system": system.name,
        "requests": "-" if online is None else f"{online.completed}/{online.sent}",
        "TTFT P50": ms(online and online.ttft_ms.median),
        "TTFT P99": ms(online and online.ttft_ms.p99),
        "TPOT P50": ms(online and online.tpot_ms.median),
        "TPOT P99": ms(online and online.tpot_ms.p99),
        "ITL P99": ms(online and online.itl_ms.p99),
        "SLO met": percent(online and online.slo_attainment),
        "goodput": _number(online and online.request_goodput, ".2f", " req/s"),
        "offline in": _rate(offline and offline.input_tokens_per_s),
        "offline cached": _rate(offline and offline.cached_tokens_per_s),
        "offline out": _rate(offline and offline.output_tokens_per_s),
        "offline total": _rate(offline and offline.total_tokens_per_s),
        "of offline-only": percent(harvest.share(system)),
        "idle": percent(system.idle_share),
        "harvest": percent(harvest.efficiency(system)),
    }


def results_markdown(systems: Sequence[SystemResult]) -> str:
    """Tables of figures, of intervals and of counters, with what they were measured on."""
    harvest = Harvest(systems)
    parts = [
        markdown([row(system, harvest) for system in systems]),
        _harvest_line(harvest),
        _conditions(systems),
        _intervals(systems),
        _counters(systems),
        _faults(systems),
        _sender(systems),
    ]
    return "\n".join(part for part in parts if part)


_PLAIN = (
    *("system", "requests", "TTFT P50", "TTFT P99", "TPOT P50", "TPOT P99", "SLO met"),
    *("offline in", "offline out", "offline total"),
)
"""Figures that are set against no other system's."""
_OFFLINE_UNIT = "Offline: tokens a second, input without cache hits"


def _plain(system: SystemResult) -> Row:
    figures = row(system, Harvest([]))
    return {column: figures[column] for column in _PLAIN}


def plain_markdown(systems: Sequence[SystemResult]) -> str:
    """A table of the figures that are set against no other system's; what they were measured on."""
    table = markdown([_plain(system) for system in systems])
    return f"{table}\n{_OFFLINE_UNIT}.\n{_conditions(systems)}{_faults(systems)}"


def side_by_side(systems: Sequence[SystemResult]) -> Table:
    """The same figures for a terminal of 80 columns: one column for each of a few systems."""
    rows = [_plain(system) for system in systems]
    table = _objectives_table(systems)
    table.caption = _OFFLINE_UNIT
    table.add_column("")
    for cells in rows:
        table.add_column(cells["system"], justify="right")
    for figure in _PLAIN[1:]:
        table.add_row(figure, *(cells[figure] for cells in rows))
    return table


def _objectives_table(systems: Sequence[SystemResult]) -> Table:
    slo = systems[0].slo
    return Table(title=f"Objectives: TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms")


def terminal_table(systems: Sequence[SystemResult]) -> Table:
    """The main figures for a terminal, which is narrow."""
    harvest = Harvest(systems)
    rows = [row(system, harvest) for system in systems]
    left_out = ("goodput", "offline in", "offline cached", "offline out")
    shown = [column for column in rows[0] if column not in left_out]
    table = _objectives_table(systems)
    for column in shown:
        justify = "left" if column == "system" else "right"
        table.add_column(column, justify=justify, overflow="fold")  # a figure is never cut either
    for cells in rows:
        table.add_row(*(cells[column] for column in shown))
    return table


def summary_line(system: SystemResult, harvest: Harvest) -> str:
    """One line on a run that has just ended."""
    figures_of = row(system, harvest)
    left_out = ("system", "goodput", "offline in", "offline cached", "offline out")
    figures = [f"{name} {text}" for name, text in figures_of.items() if name not in left_out]
    return f"{system.name}: " + ", ".join(f for f in figures if not f.endswith(" -"))


def _harvest_line(harvest: Harvest) -> str:
    worth = harvest.idle_tokens_per_s
    if worth is None:
        return "Harvest: needs an online-only and an offline-only stock system.\n"
    idle, alone = harvest.online_only.idle_share, harvest.offline_only.offline.total_tokens_per_s
    return (
        f"Harvest: offline total over what idle time is worth, {alone:,.0f} tok/s alone "
        f"x {100 * idle:.0f} % idle online-only = {worth:,.0f} tok/s.\n"
    )


def _conditions(systems: Sequence[SystemResult]) -> str:
    run = systems[0].results[0].run
    on, slo = run.environment, run.slo
    versions = ", ".join(f"{name} {version}" for name, version in on.versions.items())
    repeats = sorted({len(system.results) for system in systems})
    return (
        f"Objectives: TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms. "
        f"Window {run.window_s:g} s, seed {run.seed}, "
        f"repeats: {', '.join(map(str, repeats))}. Model {run.model}.\n"
        f"{on.hardware}; {on.system}; Python {on.python}; {versions}; "
        f"commit {on.commit or 'unknown'}.\n{_emulation(systems)}"
    )


def _emulation(systems: Sequence[SystemResult]) -> str:
    """That no such device was there, and how far this machine was in the way."""
    emulated = systems[0].results[0].run.emulated
    if emulated is None:
        return ""
    runs = [(s.name, result.run.host_share) for s in systems for result in s.results]
    waited = [f"{name} {100 * share:.1f} %" for name, share in runs if share is not None]
    return (
        f"Emulated device {emulated.device}, {emulated.time_scale:g} times slower than real time; "
        "all figures are in the device's time. Share of the window in which it waited for this "
        f"machine although there was work: {', '.join(waited) or 'not known'}.\n"
    )


def _intervals(systems: Sequence[SystemResult]) -> str:
    repeated = all(len(system.results) > 1 for system in systems)
    unit = "repeats" if repeated else "requests where a system ran once, else repeats"
    rows = [cells for system in systems if (cells := _interval_row(system))]
    if not rows:
        return ""
    return f"95 % bootstrap intervals, resampling {unit}:\n\n{markdown(rows)}"


def _interval_row(system: SystemResult) -> Row | None:
    found = dict(system.online_intervals)
    offline = system.offline_interval(lambda summary: summary.total_tokens_per_s)
    if not found and offline is None:
        return None
    return {
        "system": system.name,
        **{
            name: _span(found.get(name), 1, " ms")
            for name in ("TTFT P50", "TTFT P99", "TPOT P50", "TPOT P99")
        },
        "SLO met": _span(found.get("SLO met"), 100, " %"),
        "offline total": _span(offline, 1, " tok/s"),
    }


def _span(interval: Interval | None, factor: float, unit: str) -> str:
    if interval is None or math.isnan(interval.low):
        return "-"
    return f"{factor * interval.low:,.0f} to {factor * interval.high:,.0f}{unit}"


def _counters(systems: Sequence[SystemResult]) -> str:
    shown = [system for system in systems if any(system.counters.values())]
    names = dict.fromkeys(name for system in shown for name in system.counters)
    rows = [
        {
            "counter": name,
            **{system.name: _number(system.counters.get(name), ",.4g") for system in shown},
        }
        for name in names
        if any(system.counters.get(name) for system in shown)
    ]
    if not rows:
        return ""
    return f"What the servers counted within the window, mean of repeats:\n\n{markdown(rows)}"


def _faults(systems: Sequence[SystemResult]) -> str:
    """Requests that failed, apart from those that were cut off at the end of a run."""
    lines = []
    for system in systems:
        for class_ in ("online", "offline"):
            records = [r for result in system.results for r in getattr(result, class_)]
            errors = [r.error for r in records if r.error not in (None, UNFINISHED)]
            if errors:
                share = f"{len(errors)} of {len(records)} {class_} requests failed"
                lines.append(f"- {system.name}: {share}; first: {errors[0]}\n")
    return "".join(lines)


def _sender(systems: Sequence[SystemResult]) -> str:
    late = [s.online.lateness_ms.max for s in systems if s.online is not None and s.online.sent]
    if not late:
        return ""
    return f"The sender was at most {max(late):.0f} ms late.\n"


# ------------------------------------------------------------------------- compare

_COMPARED: Mapping[str, tuple[Callable[[SystemResult, Harvest], float | None], str, float]] = {
    "TTFT P50": (lambda s, _: s.online and s.online.ttft_ms.median, " ms", 1),
    "TTFT P99": (lambda s, _: s.online and s.online.ttft_ms.p99, " ms", 1),
    "TPOT P50": (lambda s, _: s.online and s.online.tpot_ms.median, " ms", 1),
    "TPOT P99": (lambda s, _: s.online and s.online.tpot_ms.p99, " ms", 1),
    "SLO met": (lambda s, _: s.online and s.online.slo_attainment, " %", 100),
    "offline total": (lambda s, _: s.offline and s.offline.total_tokens_per_s, " tok/s", 1),
    "harvest": (lambda s, h: h.efficiency(s), " %", 100),
}


def comparison(a: Sequence[SystemResult], b: Sequence[SystemResult]) -> str:
    """Markdown: of every system that both results hold, A, B, and B over A."""
    harvest_a, harvest_b = Harvest(a), Harvest(b)
    others = {system.name: system for system in b}
    rows = []
    for system in a:
        if system.name not in others:
            continue
        for name, (value, unit, factor) in _COMPARED.items():
            pair = value(system, harvest_a), value(others[system.name], harvest_b)
            if None not in pair:
                rows.append(_compared(system.name, name, pair, unit, factor))
    notes = "".join(f"{note}\n" for note in _differences(a, b))
    return f"{markdown(rows)}\n{notes}" if rows else f"No system is in both.\n{notes}"


def _compared(system: str, figure: str, pair: tuple[float, float], unit: str, factor: float) -> Row:
    first, second = pair
    return {
        "system": system,
        "figure": figure,
        "A": _number(factor * first, ",.0f", unit),
        "B": _number(factor * second, ",.0f", unit),
        "B / A": _number(second / first if first else None, ".2f", "x"),
    }


def _differences(a: Sequence[SystemResult], b: Sequence[SystemResult]) -> list[str]:
    """Why the two may not be comparable."""
    first, second = a[0].results[0].run, b[0].results[0].run
    pairs = {
        "machine": (first.environment.hardware, second.environment.hardware),
        "model": (first.model, second.model),
        "versions": (first.environment.versions, second.environment.versions),
        "commit": (first.environment.commit, second.environment.commit),
        "seed": (first.seed, second.seed),
        "window": (first.window_s, second.window_s),
        "objectives": (first.slo, second.slo),
    }
    notes = [f"Another {name}: {x} and {y}." for name, (x, y) in pairs.items() if x != y]
    prints = {(s.name, r.run.fingerprint) for s in a for r in s.results}
    others = {(s.name, r.run.fingerprint) for s in b for r in s.results}
    names = {name for name, _ in prints} & {name for name, _ in others}
    differing = sorted(name for name in names if not _same(name, prints, others))
    if differing:
        notes.append(f"Measured under another configuration: {', '.join(differing)}.")
    return notes


def _same(name: str, a: set[tuple[str, str]], b: set[tuple[str, str]]) -> bool:
    return {p for n, p in a if n == name} == {p for n, p in b if n == name}


# --------------------------------------------------------------------------- cells


def markdown(rows: Sequence[Row]) -> str:
    """A table of `rows`, which have the same keys: the columns. Figures stand to the right."""
    header = list(rows[0])
    rule = ["---" if column in ("system", "counter", "figure") else "---:" for column in header]
    lines = [header, rule, *([cells[column] for column in header] for cells in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{form}}{unit}"


def ms(value: float | None) -> str:
    """Milliseconds as a cell."""
    return _number(value, ",.0f" if value is None or value >= _EXACT_MS else ".1f", " ms")


def _rate(value: float | None) -> str:
    return _number(value, ",.0f")


def percent(share: float | None) -> str:
    """A share as a cell."""
    return _number(None if share is None else 100 * share, ".0f", " %")
