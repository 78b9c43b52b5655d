"""Results of a benchmark on disk, and what they say of each system.

    OUT/runs/SYSTEM.REPEAT/   run.json, requests.jsonl, server.log, conserve.yaml
    OUT/runs.jsonl            every run.json, one a line, with the figures of `headline`
    OUT/requests.jsonl        every request of every run, with its system and repeat

A run's folder counts once its run.json is there; it is written last, and in one step. A server
that was asked for them leaves its steps there too, in steps.jsonl.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.environment import Environment
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
    TokenRates,
    job_rates,
    summarize_backlog,
    summarize_offline,
    token_rates,
)
from conserve_sgl.bench.report.system import SystemConfig
from conserve_sgl.emulation import Emulation
from conserve_sgl.errors import InputError
from conserve_sgl.json_lines import json_line

__all__ = [
    "ONLINE_FIGURES",
    "Interval",
    "Result",
    "Run",
    "SystemResult",
    "by_system",
    "headline",
    "read_folder",
    "read_run",
    "run_folder",
    "write_run",
    "write_together",
]

_DRAWS, _LEVEL = 1000, 0.95


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One system under the load, once: everything but its requests.

    Args:
        fingerprint: of all that decides the outcome; runs of unequal ones are not comparable.
        started_unix_s: when the stream began.
        window_s: planned length of the stream, over which offline work and idleness are counted.
        duration_s: with the draining of the last online requests.
        ready_s: how long the server took to start.
        idle_share: of the window in which SGLang's scheduler had no work; None when not known.
        clocks: of the GPUs at the window's end; None without one.
        counters_before, counters_after: numbers that the server showed around the window.
        emulated: the device that was emulated, with its scale of time; all times are the device's.
        busy_share: of the window in which a step had the emulated device; None for a real one.
    """

    system: SystemConfig
    repeat: int
    fingerprint: str
    model: str
    seed: int
    slo: Slo
    started_unix_s: float
    window_s: float
    duration_s: float
    ready_s: float
    idle_share: float | None
    clocks: str | None = None
    counters_before: dict[str, int | float]
    counters_after: dict[str, int | float]
    command: list[str]
    server_command: list[str]
    server_env: dict[str, str]
    environment: Environment
    emulated: Emulation | None = None
    busy_share: float | None = None

    @property
    def host_share(self) -> float | None:
        """Of the window in which an emulated device waited for this machine although there was
        work: all in which no step had it and it was not idle. None for a real device."""
        if self.busy_share is None or self.idle_share is None:
            return None
        return max(1.0 - self.busy_share - self.idle_share, 0.0)

    @property
    def counters(self) -> dict[str, float]:
        """Of whole numbers what was added within the window, of others the last value."""
        return {
            name: after - self.counters_before.get(name, 0) if isinstance(after, int) else after
            for name, after in self.counters_after.items()
        }


class Result(msgspec.Struct, frozen=True):
    """A run and its requests.

    Args:
        run: all but these.
        records: what our own clients saw.
        job: of a run whose offline work was a job instead of a backlog, the lines that it finished;
            not kept by `write_run`.
    """

    run: Run
    records: tuple[RequestRecord, ...]
    job: tuple[OfflineRecord, ...] | None = None

    @property
    def online(self) -> list[RequestRecord]:
        return [record for record in self.records if record.class_ == "online"]

    @property
    def offline(self) -> list[RequestRecord]:
        return [record for record in self.records if record.class_ == "offline"]

    def online_summary(self) -> OnlineSummary | None:
        """None when no online request was to be sent."""
        if self.run.system.load == "offline":
            return None
        return summarize(self.online, self.run.duration_s, self.run.slo)

    def offline_summary(self) -> OfflineSummary | None:
        """None when there was no offline work."""
        if self.run.system.load == "online":
            return None
        if self.job is None:
            return summarize_backlog(self.offline, self.run.window_s)
        began_unix_s = self.run.started_unix_s
        return summarize_offline(self.job, began_unix_s, began_unix_s + self.run.window_s)

    def offline_rates(self, edges_s: Sequence[float]) -> TokenRates:
        """Of the offline work, between seconds after the stream began."""
        if self.job is None:
            return token_rates(edges_s, self.offline)
        return job_rates(edges_s, self.job, self.run.started_unix_s)


class Interval(msgspec.Struct, frozen=True):
    """A bootstrap interval that covers 95 % (percentile method)."""

    low: float
    high: float


class SystemResult:
    """All repeats of one system.

    Figures of online requests are of all repeats' requests together. Their intervals resample
    whole repeats; with a single repeat, its requests, which shows the spread of the requests and
    nothing of how runs differ.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = list(results)
        self.system = results[0].run.system

    @property
    def name(self) -> str:
        return self.system.name

    @property
    def slo(self) -> Slo:
        return self.results[0].run.slo

    @cached_property
    def online(self) -> OnlineSummary | None:
        """Of all repeats together."""
        if self.system.load == "offline":
            return None
        return self._summary([result.online for result in self.results])

    @cached_property
    def offline(self) -> OfflineSummary | None:
        """Of all repeats together."""
        parts = [part for r in self.results if (part := r.offline_summary()) is not None]
        if not parts:
            return None
        fields = OfflineSummary.__struct_fields__
        return OfflineSummary(**{f: sum(getattr(p, f) for p in parts) for f in fields})

    @property
    def idle_share(self) -> float | None:
        shares = [r.run.idle_share for r in self.results if r.run.idle_share is not None]
        return float(np.mean(shares)) if shares else None

    @property
    def counters(self) -> dict[str, float]:
        """Means over repeats."""
        names = dict.fromkeys(n for result in self.results for n in result.run.counters)
        found = {n: [r.run.counters.get(n, 0) for r in self.results] for n in names}
        return {name: float(np.mean(values)) for name, values in found.items()}

    @cached_property
    def online_intervals(self) -> dict[str, Interval]:
        """Of each of `ONLINE_FIGURES`; empty when there are no online requests."""
        groups = [_figures(result.online, self.slo) for result in self.results]
        if self.system.load == "offline" or not sum(map(len, groups)):
            return {}
        rng = np.random.default_rng(0)
        drawn = [_resampled(groups, rng) for _ in range(_DRAWS)]
        return {
            name: _percentiles([figure(sample) for sample in drawn])
            for name, figure in ONLINE_FIGURES.items()
        }

    def offline_interval(self, of: Callable[[OfflineSummary], float]) -> Interval | None:
        """Of a figure of the offline work; None with a single repeat, which cannot give one."""
        parts = [part for r in self.results if (part := r.offline_summary()) is not None]
        if len(parts) < 2:
            return None
        values = np.asarray([of(part) for part in parts])
        rng = np.random.default_rng(0)
        return _percentiles(rng.choice(values, (_DRAWS, len(values))).mean(axis=1))

    def _summary(self, groups: Iterable[Sequence[RequestRecord]]) -> OnlineSummary:
        records = [record for group in groups for record in group]
        return summarize(records, sum(r.run.duration_s for r in self.results), self.slo)


def _figures(records: Sequence[RequestRecord], slo: Slo) -> np.ndarray:
    """Shape (n, 3): TTFT and TPOT in ms, NaN for what did not complete, and 1 for a good one."""
    rows = [
        (
            1000 * ttft if record.completed and (ttft := ttft_s(record)) is not None else np.nan,
            1000 * tpot if (tpot := tpot_s(record)) is not None else np.nan,
            attained(record, slo),
        )
        for record in records
    ]
    return np.asarray(rows, dtype=float).reshape(-1, 3)


def _resampled(groups: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    if len(groups) == 1:
        (group,) = groups
        return group[rng.integers(len(group), size=len(group))]
    return np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])


def _quantile(column: int, q: float) -> Callable[[np.ndarray], float]:
    def of(sample: np.ndarray) -> float:
        values = sample[:, column]
        values = values[~np.isnan(values)]
        return float(np.percentile(values, q)) if len(values) else float("nan")

    return of


ONLINE_FIGURES: Mapping[str, Callable[[np.ndarray], float]] = {
    "TTFT P50": _quantile(0, 50),
    "TTFT P99": _quantile(0, 99),
    "TPOT P50": _quantile(1, 50),
    "TPOT P99": _quantile(1, 99),
    "SLO met": lambda sample: float(sample[:, 2].mean()) if len(sample) else float("nan"),
}
"""What intervals are given for, from an array of the shape of `_figures`."""


def _percentiles(values: Sequence[float]) -> Interval:
    finite = np.asarray(values)[np.isfinite(values)]
    if not len(finite):
        return Interval(float("nan"), float("nan"))
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(finite, [tail, 100 - tail]).tolist()
    return Interval(low, high)


def by_system(results: Iterable[Result]) -> list[SystemResult]:
    """One for each system, in the order in which they first appear."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.run.system.name, []).append(result)
    return [SystemResult(group) for group in groups.values()]


# --------------------------------------------------------------------------- on disk


def run_folder(out: Path, system: str, repeat: int) -> Path:
    return out / "runs" / f"{system}.{repeat}"


def write_run(folder: Path, result: Result) -> None:
    """Write requests, then run.json, which makes the folder count."""
    _write_jsonl(folder / "requests.jsonl", result.records)
    partial = folder / "run.json.partial"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(result.run), indent=1))
    os.replace(partial, folder / "run.json")


def read_run(folder: Path) -> Result | None:
    """None when the run was not finished.

    Raises:
        InputError: a file that is not what `write_run` wrote.
    """
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        run = msgspec.json.decode(path.read_bytes(), type=Run)
        path = folder / "requests.jsonl"
        decoder = msgspec.json.Decoder(RequestRecord)
        return Result(run, tuple(decoder.decode_lines(path.read_bytes())))
    except (OSError, msgspec.DecodeError) as e:
        raise InputError(path, f"is no result of this version of the benchmark: {e}") from e


def read_folder(out: Path) -> list[Result]:
    """The finished runs under `out`, by the time at which they began.

    Raises:
        InputError: there is none, or one that cannot be read.
    """
    folders = sorted((out / "runs").glob("*.*"))
    results = [result for folder in folders if (result := read_run(folder)) is not None]
    if not results:
        raise InputError(out, "holds no finished run")
    return sorted(results, key=lambda result: result.run.started_unix_s)


def headline(
    system: SystemResult, offline_only: SystemResult | None, ceiling_tok_s: float | None = None
) -> dict[str, str | float | None]:
    """The few figures by which systems are compared, None where one cannot be told.

    Args:
        system: the system.
        offline_only: stock SGLang with the offline work alone.
        ceiling_tok_s: what a scheduler could do at most under the objectives, if that is known.
    """
    online, offline = system.online, system.offline
    rate = None if offline is None else offline.total_tokens_per_s
    alone = None if offline_only is None else offline_only.offline
    return {
        "system": system.name,
        "slo_met_share": _finite(online and online.slo_attainment),
        "offline_tok_s": rate,
        "share_of_offline_only": _share(rate, alone and alone.total_tokens_per_s),
        "share_of_ceiling": _share(rate, ceiling_tok_s),
        "p99_ttft_ms": _finite(online and online.ttft_ms.p99),
        "p99_tpot_ms": _finite(online and online.tpot_ms.p99),
        "p99_itl_ms": _finite(online and online.itl_ms.p99),
    }


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else value


def write_together(
    out: Path, results: Sequence[Result], ceilings_tok_s: Mapping[str, float] | None = None
) -> None:
    """Write runs.jsonl and requests.jsonl; `ceilings_tok_s` are by the name of the system."""
    ceilings = ceilings_tok_s or {}
    alone = next((s for s in by_system(results) if s.system.is_offline_ceiling), None)
    lines = (
        {
            **msgspec.to_builtins(result.run),
            "system_config": msgspec.to_builtins(result.run.system),
            **headline(SystemResult([result]), alone, ceilings.get(result.run.system.name)),
        }
        for result in results
    )
    _write_jsonl(out / "runs.jsonl", lines)
    _write_jsonl(
        out / "requests.jsonl",
        (
            {**_place(result.run), **msgspec.to_builtins(record)}
            for result in results
            for record in result.records
        ),
    )


def _place(run: Run) -> Mapping[str, Any]:
    return {"system": run.system.name, "repeat": run.repeat}


def _write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON document a line."""
    with path.open("wb") as file:
        file.writelines(map(json_line, rows))
