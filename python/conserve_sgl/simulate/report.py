"""What a simulation says: tables, and answers to an operator's questions."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from conserve_sgl.bench.report.results import SystemResult
from conserve_sgl.bench.report.tables import Harvest, markdown, ms, row
from conserve_sgl.simulate.config import Simulation
from conserve_sgl.simulate.simulation import Simulated

__all__ = ["planning", "simulation_markdown", "terminal_table"]

_DAY_S = 86_400
_LAST_SHARE = 0.9
_DIAL_COLUMNS = ("TTFT P99", "TPOT P99", "ITL P99", "SLO met", "offline total", "of offline-only")
_LEFT_OUT = ("goodput", "offline cached", "idle", "harvest")
_SHOWN = ("system", *_DIAL_COLUMNS, "of ceiling")


def simulation_markdown(simulation: Simulation, simulated: Sequence[Simulated]) -> str:
    """The table, the dial, what they say, and what they are of."""
    main = [s for s in simulated if not s.run.on_dial]
    harvest = _harvest(simulated)
    parts = [
        markdown([_row(s, harvest) for s in main]),
        _ceilings(simulated),
        _dial_table(simulated, harvest),
        planning(simulated),
        _conditions(simulation, simulated),
    ]
    return "\n".join(part for part in parts if part)


def terminal_table(simulated: Sequence[Simulated]) -> Table:
    """The main figures for a terminal."""
    harvest = _harvest(simulated)
    rows = [_row(s, harvest) for s in simulated]
    table = Table(title="Simulated")
    for column in rows[0]:
        if column in _SHOWN:
            justify = "left" if column == "system" else "right"
            table.add_column(column, justify=justify, overflow="fold")
    for cells in rows:
        table.add_row(*(text for column, text in cells.items() if column in _SHOWN))
    return table


def _harvest(simulated: Sequence[Simulated]) -> Harvest:
    return Harvest([s.system for s in simulated])


def _row(simulated: Simulated, harvest: Harvest) -> dict[str, str]:
    system = simulated.system
    cells: dict[str, str] = {}
    for column, text in row(system, harvest).items():
        if column == "ITL P99" and system.online is not None:
            itl = system.online.itl_ms
            cells |= {"ITL P50": ms(itl.median), "ITL P99": text, "longest": ms(itl.max)}
        elif column == "ITL P99":
            cells |= dict.fromkeys(("ITL P50", "ITL P99", "longest"), "-")
        elif column not in _LEFT_OUT:
            cells[column] = text
    cells["of ceiling"] = _percent(share_of_ceiling(simulated))
    return cells


def share_of_ceiling(simulated: Simulated) -> float | None:
    """Offline tokens/s over the most that there could be; None where there is none."""
    offline, most = simulated.system.offline, simulated.ceiling.tok_s
    return offline.total_tokens_per_s / most if offline is not None and most else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _objectives(simulated: Simulated) -> str:
    slo, ms = simulated.run.slo, simulated.result.run.slo
    texts = []
    for name, text, value in (("TTFT", slo.ttft, ms.ttft_ms), ("TPOT", slo.tpot, ms.tpot_ms)):
        relative = f" ({value:,.1f} ms)" if text.endswith("x") else ""
        texts.append(f"{name} {text}{relative}")
    return ", ".join(texts)


def _ceilings(simulated: Sequence[Simulated]) -> str:
    """What could be done at most, and what cannot be met, once for each pair of objectives."""
    lines: dict[str, None] = {}
    for one in simulated:
        if one.run.system.load != "both" or one.run.on_dial:
            continue
        objectives = _objectives(one)
        if one.ceiling.tok_s:
            lines[f"Ceiling at {objectives}: {one.ceiling.tok_s:,.0f} offline tok/s.\n"] = None
        for sentence in one.ceiling.unmet:
            lines[f"At {objectives} {sentence}.\n"] = None
    return "".join(lines)


def _dial_table(simulated: Sequence[Simulated], harvest: Harvest) -> str:
    rows = []
    for one in simulated:
        if not one.run.on_dial:
            continue
        figures = row(one.system, harvest)
        most = f"{one.ceiling.tok_s:,.0f}" if one.ceiling.tok_s else "-"
        rows.append(
            {
                "system": one.system.name,
                "objectives": _objectives(one),
                **{column: figures[column] for column in _DIAL_COLUMNS},
                "ceiling": most,
                "of ceiling": _percent(share_of_ceiling(one)),
            }
        )
    return f"The dial:\n\n{markdown(rows)}" if rows else ""


def planning(simulated: Sequence[Simulated]) -> str:
    """Answers in words: tokens a day, GPUs saved, where the last tenth is bought."""
    alone = next((s.system for s in simulated if s.system.system.is_offline_ceiling), None)
    sentences = []
    for one in simulated:
        system = one.system
        if system.system.kind != "conserve" or one.run.on_dial or system.offline is None:
            continue
        sentences.append(_beside(system, alone))
        sentences += _last_tenth(system.name, simulated)
    return "".join(f"- {sentence}\n" for sentence in sentences)


def _beside(system: SystemResult, alone: SystemResult | None) -> str:
    rate = system.offline.total_tokens_per_s
    met = _percent(system.online.slo_attainment) if system.online is not None else "-"
    text = (
        f"{system.name}: {rate * _DAY_S / 1e6:,.0f} million offline tokens a day beside this "
        f"stream, with {met} of its requests within both objectives"
    )
    if alone is None or alone.offline is None or not alone.offline.total_tokens_per_s:
        return f"{text}."
    share = rate / alone.offline.total_tokens_per_s
    return f"{text}: every such GPU saves {share:.2f} of one that does offline work alone."


def _last_tenth(name: str, simulated: Sequence[Simulated]) -> list[str]:
    """The tightest setting of the dial with nine tenths of what the loosest gives."""
    points = [s for s in simulated if s.run.on_dial and s.system.name.startswith(f"{name}-")]
    rates = [p.system.offline.total_tokens_per_s for p in points if p.system.offline is not None]
    if len(rates) < 2 or not max(rates):
        return []
    enough = [p for p, rate in zip(points, rates, strict=True) if rate >= _LAST_SHARE * max(rates)]
    first = min(enough, key=lambda p: (p.result.run.slo.tpot_ms, p.result.run.slo.ttft_ms))
    return [
        f"{name}: nine tenths of the most that the dial gives are there at "
        f"{_objectives(first)}; looser objectives buy the last tenth."
    ]


def _conditions(simulation: Simulation, simulated: Sequence[Simulated]) -> str:
    device, limits = simulation.device, simulation.flags.limits
    run = simulated[0].result.run
    offline = simulation.offline
    return (
        f"Simulated, not measured: {device.name} ({device.gpu}, {device.model}, {device.backend} "
        f"attention, SGLang {device.sglang}; {device.source}).\n"
        f"Judged by: {_objectives(simulated[0])}; a system with objectives of its own by those; "
        "a factor is one of the online-only run's P99.\n"
        f"Window {run.window_s:g} s, seed {run.seed}, {len(simulated[0].result.online)} online "
        f"requests, {offline.in_flight} offline ones in flight. KV pool {limits.kv_tokens:,} "
        f"tokens, {limits.rows} rows, chunks of {limits.chunk_tokens:,} tokens. "
        f"conserve-sgl commit {run.environment.commit or 'unknown'}.\n"
    )
