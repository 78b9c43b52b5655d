"""What a running server says of itself: seconds without work, and counters.

All of it comes from SGLang's own routes, so that stock SGLang and conserve are read alike.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import msgspec

__all__ = ["Reading", "busy_share", "idle_share", "read_server"]

_IDLE = "sglang:scheduler_idle_seconds_total"
_BUSY = "conserve:emulated_device_busy_seconds_total"
_RETRACTED = {
    "sglang:num_retracted_requests_total": "retracted_requests",
    "sglang:num_retracted_input_tokens_total": "retracted_input_tokens",
    "sglang:num_retracted_output_tokens_total": "retracted_output_tokens",
}
_SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{.*\})? (?P<value>\S+)", re.MULTILINE)


class Reading(msgspec.Struct, frozen=True):
    """The server at one moment.

    `idle_s` is SGLang's count of the seconds in which its scheduler had no runnable or queued
    work, a second or one step late; None from a server without --enable-metrics. `counters` are
    whatever numbers conserve shows, and SGLang's retractions. `busy_s` is an emulated device's
    count of the seconds in which a step had it; None from any other.
    """

    at_s: float
    idle_s: float | None
    counters: dict[str, int | float]
    busy_s: float | None = None


async def read_server(base_url: str) -> Reading:
    """Read `/metrics` and `/server_info` of the server at `base_url`.

    Raises:
        aiohttp.ClientError: it does not answer.
    """
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(base_url, timeout=timeout, raise_for_status=False) as session:
        at_s = time.perf_counter()
        metrics = parse_metrics(await _text(session, "/metrics"))
        info = await _text(session, "/server_info")
    counters = {
        ours: int(metrics[theirs]) for theirs, ours in _RETRACTED.items() if theirs in metrics
    }
    counters.update(_flatten(_conserve_state(info)))
    return Reading(at_s, metrics.get(_IDLE), counters, metrics.get(_BUSY))


def idle_share(before: Reading, after: Reading) -> float | None:
    """Of the time between two readings, between 0 and 1; None when the server does not count."""
    return _share(before, after, before.idle_s, after.idle_s)


def busy_share(before: Reading, after: Reading) -> float | None:
    """Of the time between two readings in which a step had an emulated device; else None."""
    return _share(before, after, before.busy_s, after.busy_s)


def _share(
    before: Reading, after: Reading, from_s: float | None, to_s: float | None
) -> float | None:
    if from_s is None or to_s is None:
        return None
    share = (to_s - from_s) / (after.at_s - before.at_s)
    return min(max(share, 0.0), 1.0)


def parse_metrics(text: str) -> dict[str, float]:
    """Mean over label sets (ranks) of every sample in a Prometheus exposition."""
    found: dict[str, list[float]] = {}
    for sample in _SAMPLE.finditer(text):
        found.setdefault(sample["name"], []).append(float(sample["value"]))
    return {name: sum(values) / len(values) for name, values in found.items()}


async def _text(session: aiohttp.ClientSession, path: str) -> str:
    async with session.get(path) as response:
        return await response.text() if response.status == 200 else ""


def _conserve_state(server_info: str) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(server_info)["internal_states"][0]["conserve"]
    except (msgspec.DecodeError, LookupError, TypeError):
        return {}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in a tree of mappings, with its dotted name."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
