"""What online requests of the servers went through meanwhile, from their own metrics.

SGLang tells the classes apart when it runs with `--enable-metrics --enable-priority-scheduling`:
its latency histograms then have a label `priority`, and all offline requests carry one value.
Without that nothing is said. Best effort: a server that does not answer is as one without metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import msgspec

__all__ = ["Latency", "OnlineLatency", "Snapshot", "compare", "snapshot"]

TIMEOUT_S = 5.0
_HISTOGRAMS = {
    "ttft": "sglang:time_to_first_token_seconds",
    "tpot": "sglang:inter_token_latency_seconds",
}


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of `requests` online requests: mean, and p99 as far as the histogram's buckets tell.

    `tpot` is over the gaps between tokens. None: there was none.
    """

    requests: int
    ttft_mean_ms: float | None
    ttft_p99_ms: float | None
    tpot_mean_ms: float | None
    tpot_p99_ms: float | None


class OnlineLatency(msgspec.Struct, frozen=True, kw_only=True):
    """`before`: from the servers' start to the run's. `during`: the run."""

    before: Latency
    during: Latency


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """A Prometheus histogram, in seconds; `buckets` maps an upper bound to the count up to it."""

    count: float = 0.0
    sum_s: float = 0.0
    buckets: dict[float, float] = {}

    def plus(self, other: Histogram, sign: int = 1) -> Histogram:
        """Both together."""
        bounds = self.buckets.keys() | other.buckets.keys()
        return Histogram(
            count=self.count + sign * other.count,
            sum_s=self.sum_s + sign * other.sum_s,
            buckets={
                b: self.buckets.get(b, 0.0) + sign * other.buckets.get(b, 0.0) for b in bounds
            },
        )

    def minus(self, other: Histogram) -> Histogram:
        """What came after `other`."""
        return self.plus(other, -1)

    def mean_ms(self) -> float | None:
        """None without a value."""
        return 1e3 * self.sum_s / self.count if self.count > 0 else None

    def quantile_ms(self, share: float) -> float | None:
        """Interpolated inside its bucket; the last finite bound for what lies above it."""
        if self.count <= 0:
            return None
        rank, low_s, below = share * self.count, 0.0, 0.0
        for bound_s, count in sorted(self.buckets.items()):
            if count >= rank and math.isfinite(bound_s):
                inside = (rank - below) / (count - below) if count > below else 1.0
                return 1e3 * (low_s + inside * (bound_s - low_s))
            if math.isfinite(bound_s):
                low_s, below = bound_s, count
        return 1e3 * low_s


Snapshot = dict[str, Histogram]


def snapshot(endpoints: Iterable[str], api_key: str | None) -> Snapshot | None:
    """The online latencies of all endpoints since they started; None if one does not tell."""
    sums = {name: Histogram() for name in _HISTOGRAMS}
    for endpoint in endpoints:
        info = _server_info(_fetch(f"{endpoint.rstrip('/')}/server_info", api_key))
        if not info.get("enable_metrics") or not info.get("enable_priority_scheduling"):
            return None
        metrics = _fetch(f"{endpoint.rstrip('/')}/metrics", api_key)
        found = read_metrics((metrics or b"").decode(errors="replace"), _offline_label(info))
        sums = {name: sums[name].plus(found[name]) for name in sums}
    return sums


def compare(before: Snapshot | None, after: Snapshot | None) -> OnlineLatency | None:
    """How the latencies of the time between two snapshots differ from those before it."""
    if before is None or after is None:
        return None
    during = {name: after[name].minus(before[name]) for name in after}
    return OnlineLatency(before=_latency(before), during=_latency(during))


def read_metrics(text: str, offline: str) -> Snapshot:
    """The two histograms in `text` over all values of the label `priority` but `offline`."""
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(text)}
    found = {}
    for key, name in _HISTOGRAMS.items():
        samples = families[name].samples if name in families else []
        online = [sample for sample in samples if sample.labels.get("priority") != offline]
        buckets: dict[float, float] = {}
        for sample in online:
            if sample.name.endswith("_bucket"):
                bound_s = float(sample.labels["le"])
                buckets[bound_s] = buckets.get(bound_s, 0.0) + sample.value
        found[key] = Histogram(
            count=sum(sample.value for sample in online if sample.name.endswith("_count")),
            sum_s=sum(sample.value for sample in online if sample.name.endswith("_sum")),
            buckets=buckets,
        )
    return found


def _server_info(raw: bytes | None) -> dict[str, Any]:
    try:
        info = msgspec.json.decode(raw or b"{}")
    except msgspec.DecodeError:
        return {}
    return info if isinstance(info, dict) else {}


def _offline_label(info: dict[str, Any]) -> str:
    default = info.get("default_priority_value") or 0
    return str(default + (1 if info.get("schedule_low_priority_values_first") else -1))


def _latency(histograms: Snapshot) -> Latency:
    ttft, tpot = histograms["ttft"], histograms["tpot"]
    return Latency(
        requests=round(ttft.count),
        ttft_mean_ms=ttft.mean_ms(),
        ttft_p99_ms=ttft.quantile_ms(0.99),
        tpot_mean_ms=tpot.mean_ms(),
        tpot_p99_ms=tpot.quantile_ms(0.99),
    )


def _fetch(url: str, api_key: str | None) -> bytes | None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urlopen(Request(url, headers=headers), timeout=TIMEOUT_S) as reply:
            return reply.read()
    except (URLError, OSError, ValueError):
        return None
