"""All results of a run on a GPU in at most a hundred lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec

from conserve_sgl.bench.gpu.parts import PARTS, Setting
from conserve_sgl.bench.gpu.state import States
from conserve_sgl.bench.report.environment import Environment
from conserve_sgl.bench.report.metrics import Distribution
from conserve_sgl.bench.report.results import SystemResult, by_system, read_folder
from conserve_sgl.bench.report.tables import markdown
from conserve_sgl.errors import InputError

__all__ = ["bench_table", "summary"]

_COSTS_LINES = 12


def summary(setting: Setting) -> str:
    """Markdown: the machine, a table of every benchmark, the cost of single operations, parts."""
    parts = [
        _machine(setting),
        *(_bench(folder) for folder in sorted(setting.results.glob("*-*")) if folder.is_dir()),
        *_costs(setting),
        _parts(setting),
    ]
    return "\n".join(part for part in parts if part)


def _machine(setting: Setting) -> str:
    path = setting.machine / "environment.json"
    if not path.exists():
        return ""
    on = msgspec.json.decode(path.read_bytes(), type=Environment)
    versions = ", ".join(f"{name} {version}" for name, version in on.versions.items())
    lines = [f"{on.hardware}; driver, greatest clocks, power, memory: {on.driver or 'no GPU'}"]
    lines += [f"{versions}; commit {on.commit or 'unknown'}; attention {setting.backend}"]
    backend = setting.machine / "backend.json"
    if backend.exists():
        lines.append(f"check: {json.dumps(json.loads(backend.read_bytes()))}"[:600])
    return "\n".join(lines) + "\n"


def _bench(folder: Path) -> str:
    try:
        systems = by_system(read_folder(folder))
    except InputError:
        return ""
    slo = systems[0].results[0].run.slo
    title = f"{folder.name}: TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms where none is named"
    return f"{title}\n\n{bench_table(systems)}"


def bench_table(systems: list[SystemResult]) -> str:
    """A row for each system."""
    alone = next((s.offline for s in systems if s.system.is_offline_ceiling), None)
    ceiling = alone and alone.total_tokens_per_s
    return markdown([_row(system, ceiling) for system in systems])


def _row(system: SystemResult, offline_only: float | None) -> dict[str, str]:
    online, offline = system.online, system.offline
    total = offline and offline.total_tokens_per_s
    shared = system.system.load == "both"
    run, repeats = system.results[0].run, len(system.results)
    return {
        "system": system.name,
        "s": f"{run.window_s:g}" if repeats == 1 else f"{repeats} x {run.window_s:g}",
        "requests": f"{online.completed}/{online.sent}" if online else "-",
        "TTFT P50 / P99": _pair(online and online.ttft_ms, "median", "p99", 0),
        "TPOT P50 / P99": _pair(online and online.tpot_ms, "median", "p99", 1),
        "ITL P99 / max": _pair(online and online.itl_ms, "p99", "max", 0),
        "SLO met": f"{online.slo_attainment:.1%}" if online else "-",
        "offline in + out = tok/s": "-"
        if offline is None
        else f"{offline.input_tokens_per_s:,.0f} + {offline.output_tokens_per_s:,.0f} "
        f"= {total:,.0f}",
        "of offline-only": f"{total / offline_only:.0%}" if shared and offline_only else "-",
        "idle": "-" if system.idle_share is None else f"{system.idle_share:.0%}",
        "start": f"{run.ready_s:.0f} s",
    }


def _pair(of: Distribution | None, one: str, other: str, digits: int) -> str:
    if of is None or math.isnan(of.median):
        return "-"
    return f"{getattr(of, one):.{digits}f} / {getattr(of, other):.{digits}f}"


def _costs(setting: Setting) -> list[str]:
    found = sorted(setting.costs.glob("*/*.md"))
    return [f"{path.parent.name}:\n\n{_head(path)}" for path in found]


def _head(path: Path) -> str:
    return "".join(f"{line}\n" for line in path.read_text("utf-8").splitlines()[:_COSTS_LINES])


def _parts(setting: Setting) -> str:
    states = States(setting.machine / "parts.json").by_part
    told = [
        f"{part.name} {states[part.name].text}, {states[part.name].seconds:.0f} s"
        for part in PARTS
        if part.name in states
    ]
    return f"Parts: {'; '.join(told)}.\n" if told else ""
