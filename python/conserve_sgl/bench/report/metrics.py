"""The field's latency metrics, by SGLang's definitions and under SGLang's key names.

TTFT   sent -> first token, a request.
TPOT   (E2E - TTFT) / (n - 1), a request of n > 1 tokens; such of one token have none.
ITL    every gap between tokens; a chunk of k tokens is k gaps of a k-th each.
E2E    sent -> last token, a request.
SLO attainment counts over all requests *sent*: failed, aborted and unfinished ones are misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np

from conserve_sgl.bench.load.record import RequestRecord

__all__ = [
    "Distribution",
    "OnlineSummary",
    "Slo",
    "attained",
    "itls_s",
    "summarize",
    "tpot_s",
    "ttft_s",
]


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Latency objectives of one online request; it is good when it meets both."""

    ttft_ms: Annotated[float, msgspec.Meta(gt=0)]
    tpot_ms: Annotated[float, msgspec.Meta(gt=0)]


class Distribution(msgspec.Struct, frozen=True):
    """Of values in milliseconds; every field is NaN when there were none."""

    mean: float
    median: float
    std: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of_seconds(cls, values_s: Sequence[float]) -> Distribution:
        """Of `values_s`, in milliseconds; percentiles interpolate linearly."""
        if not len(values_s):
            return cls(*[float("nan")] * 7)
        ms = np.asarray(values_s) * 1000
        p50, p90, p95, p99 = np.percentile(ms, [50, 90, 95, 99]).tolist()
        return cls(float(ms.mean()), p50, float(ms.std()), p90, p95, p99, float(ms.max()))


class OnlineSummary(msgspec.Struct, frozen=True):
    """One stream of requests, summed up."""

    duration_s: float
    sent: int
    completed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    e2e_latency_ms: Distribution
    lateness_ms: Distribution
    slo: Slo
    good: int
    ttft_met: int
    tpot_met: int

    @property
    def slo_attainment(self) -> float:
        """Good requests over requests sent; NaN when none was sent."""
        return self._share(self.good)

    @property
    def request_goodput(self) -> float:
        """Good requests a second."""
        return self.good / self.duration_s

    @property
    def output_throughput(self) -> float:
        """Output tokens a second of completed requests."""
        return self.output_tokens / self.duration_s

    def _share(self, count: int) -> float:
        return count / self.sent if self.sent else float("nan")

    def sglang_keys(self) -> dict[str, object]:
        """The result line that `python -m sglang.benchmark.serving --goodput` would write."""
        latencies = {
            f"{statistic}_{metric}_ms": value
            for metric in ("ttft", "tpot", "itl", "e2e_latency")
            for statistic, value in msgspec.structs.asdict(getattr(self, f"{metric}_ms")).items()
            if statistic != "max" or metric == "itl"
        }
        total_tokens = self.input_tokens + self.output_tokens
        return {
            "duration": self.duration_s,
            "completed": self.completed,
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.completed / self.duration_s,
            "input_throughput": self.input_tokens / self.duration_s,
            "output_throughput": self.output_throughput,
            "total_throughput": total_tokens / self.duration_s,
            **latencies,
            "goodput_slos_ms": {"ttft": self.slo.ttft_ms, "tpot": self.slo.tpot_ms},
            "request_goodput": self.request_goodput,
            "slo_attainment": self.slo_attainment,
            "slo_attainment_by_metric": {
                "ttft": self._share(self.ttft_met),
                "tpot": self._share(self.tpot_met),
            },
        }


def summarize(records: Sequence[RequestRecord], duration_s: float, slo: Slo) -> OnlineSummary:
    """Latencies and tokens are of completed requests, attainment is over all of `records`."""
    done = [record for record in records if record.completed]
    ttfts = [ttft for record in done if (ttft := ttft_s(record)) is not None]
    tpots = [tpot for record in done if (tpot := tpot_s(record)) is not None]
    return OnlineSummary(
        duration_s=duration_s,
        sent=len(records),
        completed=len(done),
        input_tokens=sum(record.prompt_tokens for record in done),
        cached_tokens=sum(record.cached_tokens for record in done),
        output_tokens=sum(record.completion_tokens for record in done),
        ttft_ms=Distribution.of_seconds(ttfts),
        tpot_ms=Distribution.of_seconds(tpots),
        itl_ms=Distribution.of_seconds([gap for record in done for gap in itls_s(record)]),
        e2e_latency_ms=Distribution.of_seconds([r.done_s - r.sent_s for r in done]),
        lateness_ms=Distribution.of_seconds([record.lateness_s for record in records]),
        slo=slo,
        good=sum(attained(record, slo) for record in records),
        ttft_met=sum(_met_ttft(record, slo) for record in records),
        tpot_met=sum(_met_tpot(record, slo) for record in records),
    )


def ttft_s(record: RequestRecord) -> float | None:
    """None before the first token."""
    return record.chunk_times_s[0] - record.sent_s if record.chunk_times_s else None


def tpot_s(record: RequestRecord) -> float | None:
    """None for a request that did not complete or has a single token."""
    if not record.completed or record.completion_tokens < 2:
        return None
    return (record.done_s - record.chunk_times_s[0]) / (record.completion_tokens - 1)


def itls_s(record: RequestRecord) -> list[float]:
    """Every gap after the first chunk, whose further tokens came with no gap of their own."""
    gaps = np.diff(record.chunk_times_s)
    tokens = np.asarray(record.chunk_tokens[1:], dtype=np.int64)
    return np.repeat(gaps / np.maximum(tokens, 1), tokens).tolist()


def attained(record: RequestRecord, slo: Slo) -> bool:
    """Whether a request completed within both objectives."""
    return _met_ttft(record, slo) and _met_tpot(record, slo)


def _met_ttft(record: RequestRecord, slo: Slo) -> bool:
    ttft = ttft_s(record)
    return record.completed and ttft is not None and ttft * 1000 <= slo.ttft_ms


def _met_tpot(record: RequestRecord, slo: Slo) -> bool:
    return record.completed and (tpot_s(record) or 0.0) * 1000 <= slo.tpot_ms
