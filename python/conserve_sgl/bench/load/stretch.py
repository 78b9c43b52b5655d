"""A benchmark on an emulated device whose time runs slower, and its results in device time.

The server and the load live in stretched time: the arrivals, the lengths of a benchmark's phases
and the objectives of conserve are multiplied by the scale. What was measured is divided by it, so
that every figure that is written or shown is in the device's time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from conserve_sgl.bench.load.arrivals import Arrival
from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.config import SloConfig

__all__ = ["device_counters", "device_record", "host_arrivals", "host_conserve"]

_UNITS = ("_s", "_ms", "_ns")


def host_arrivals(arrivals: Iterable[Arrival], scale: float) -> tuple[Arrival, ...]:
    """The same requests, so many times later."""
    return tuple(msgspec.structs.replace(a, at_s=a.at_s * scale) for a in arrivals)


def host_conserve(section: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """A configuration of conserve with its times in host time, those that it leaves out, too."""
    if scale == 1:
        return dict(section)
    slo = msgspec.convert(section.get("slo") or {}, SloConfig)
    stretched = {
        "ttft": _stretched(slo.ttft, scale),
        "tpot": _stretched(slo.tpot, scale),
        "longest_gap": _stretched(slo.longest_gap or _longest_gap(slo), scale),
        "yield_ms": slo.yield_ms * scale,
    }
    return {**section, "slo": stretched}


def _longest_gap(slo: SloConfig) -> str:
    """What stands for one that is left out; beside a relative objective its least."""
    tpot_s = 0.0 if slo.tpot.endswith("x") else float(slo.tpot.removesuffix("ms")) / 1e3
    return f"{1e3 * slo.objectives().longest_gap_s(tpot_s):.6f}ms"


def _stretched(objective: str, scale: float) -> str:
    if objective.endswith("x"):  # a factor
        return objective
    return f"{float(objective.removesuffix('ms')) * scale:.6f}ms"


def device_record(record: RequestRecord, scale: float) -> RequestRecord:
    """What the client would have seen of a request in device time."""
    return msgspec.structs.replace(
        record,
        due_s=record.due_s / scale,
        sent_s=record.sent_s / scale,
        done_s=None if record.done_s is None else record.done_s / scale,
        chunk_times_s=tuple(at_s / scale for at_s in record.chunk_times_s),
    )


def device_counters(counters: Mapping[str, int | float], scale: float) -> dict[str, int | float]:
    """The numbers that a server showed; those whose name has a unit of time are divided.

    A whole number stays one: it is counted up, and its growth within a window is what is told.
    """
    return {
        name: _divided(number, scale) if scale != 1 and _is_time(name) else number
        for name, number in counters.items()
    }


def _divided(number: int | float, scale: float) -> int | float:
    return round(number / scale) if isinstance(number, int) else number / scale


def _is_time(name: str) -> bool:
    return any(part.endswith(_UNITS) for part in name.split("."))
