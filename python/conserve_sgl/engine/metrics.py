"""Conserve's numbers on SGLang's own `/metrics`, when that is on (`--enable-metrics`).

They are those of `/server_info` (`internal_states[i].conserve`), under the names of METRICS, with
SGLang's labels. Written about once a second; docs/metrics.md is the page for people.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from math import nan
from typing import Any, Literal

import msgspec

__all__ = ["METRICS", "Exporter", "Metric"]


class Metric(msgspec.Struct, frozen=True):
    """One metric.

    Args:
        name: in Prometheus; a counter's has `_total` at its end.
        key: in the state, with dots between the keys of nested parts; a number, or with a label a
            mapping from its values to numbers.
        help: one sentence.
        label: name of a label besides SGLang's, or None.
    """

    name: str
    key: str
    help: str
    label: str | None = None

    def value_in(self, state: Mapping[str, Any]) -> Any:
        """What `state` holds under the key."""
        return functools.reduce(operator.getitem, self.key.split("."), state)

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        """A counter counts from the start of the server and only goes up."""
        return "counter" if self.name.endswith("_total") else "gauge"


METRICS = (
    Metric(
        "conserve:offline_queue_reqs",
        "offline_waiting",
        "Offline requests that wait in the offline queue.",
    ),
    Metric(
        "conserve:offline_queue_tokens",
        "offline_waiting_tokens",
        "Prompt and output tokens that they are expected to take.",
    ),
    Metric(
        "conserve:offline_queue_jobs",
        "offline_waiting_jobs",
        "Jobs that have a request waiting in the offline queue.",
    ),
    Metric(
        "conserve:offline_oldest_wait_seconds",
        "offline_oldest_wait_s",
        "Age of the offline request that waits and arrived first.",
    ),
    Metric(
        "conserve:offline_deadline_at_risk_reqs",
        "offline_at_risk",
        "Waiting offline requests that will miss their deadline at the present rate.",
    ),
    Metric(
        "conserve:offline_paused",
        "offline_paused",
        "1 while an operator keeps offline work from running.",
    ),
    Metric(
        "conserve:offline_starved_seconds",
        "offline_starved_s",
        "How long offline work has waited without any of it running; the log says why.",
    ),
    Metric(
        "conserve:offline_bound_seconds_total",
        "offline_bound_s",
        "For how long each bound held offline work back; `nothing waits` is none.",
        label="bound",
    ),
    Metric(
        "conserve:offline_tokens_per_second",
        "offline_tokens_per_s",
        "Offline prompt tokens computed and output tokens a second, over the last half minute.",
    ),
    Metric(
        "conserve:offline_alone_tokens_per_second",
        "offline_alone_tokens_per_s",
        "What the engine would do of that work with no online request there, by its latency model; "
        "NaN until there was some.",
    ),
    Metric(
        "conserve:offline_spare_reqs",
        "spare.requests",
        "Offline requests that would be taken now beyond those that are here.",
    ),
    Metric(
        "conserve:offline_spare_tokens_per_second",
        "spare.tokens_per_s",
        "Offline tokens a second beyond those of now; NaN until offline work has waited once.",
    ),
    Metric(
        "conserve:offline_running_reqs",
        "offline_running",
        "Offline requests that prefill or decode.",
    ),
    Metric(
        "conserve:offline_parked_reqs",
        "offline_parked",
        "Offline requests that sit out and keep their KV.",
    ),
    Metric(
        "conserve:offline_tokens_total",
        "offline_tokens",
        "Offline tokens: prompt tokens computed, prompt tokens cached, and output tokens.",
        label="kind",
    ),
    Metric(
        "conserve:offline_accepted_total",
        "offline_accepted",
        "Offline requests that were taken into the offline queue.",
    ),
    Metric(
        "conserve:offline_refused_total",
        "offline_refused",
        "Offline requests that the scheduler refused because the offline queue was full.",
    ),
    Metric(
        "conserve:offline_finished_total",
        "offline_finished",
        "Offline requests that were answered.",
    ),
    Metric(
        "conserve:offline_aborted_total",
        "offline_aborted",
        "Offline requests that were aborted: their client left, or asked for it.",
    ),
    Metric(
        "conserve:offline_deadline_missed_total",
        "offline_deadline_missed",
        "Offline requests that were answered after their deadline.",
    ),
    Metric(
        "conserve:offline_preemptions_total",
        "offline_preempted",
        "Times that an offline request gave up its row and KV and went back to the queue.",
    ),
    Metric(
        "conserve:offline_rows_parked_total",
        "offline_rows_parked",
        "Times that an offline row was made to sit out.",
    ),
    Metric(
        "conserve:offline_chunks_parked_total",
        "offline_chunks_parked",
        "Times that an offline prompt was put aside between two of its chunks.",
    ),
    Metric(
        "conserve:checkpointed_tokens_total",
        "checkpoint.checkpointed_tokens",
        "Tokens of offline requests whose KV was checkpointed while they ran.",
    ),
    Metric(
        "conserve:checkpoint_restored_tokens_total",
        "checkpoint.restored_tokens",
        "Tokens that a resumed offline request found in the cache.",
    ),
    Metric(
        "conserve:checkpoint_recomputed_tokens_total",
        "checkpoint.recomputed_tokens",
        "Tokens that a resumed offline request computed again.",
    ),
    Metric(
        "conserve:checkpoint_loaded_ahead_tokens_total",
        "checkpoint.loaded_ahead_tokens",
        "Tokens of waiting offline requests that were loaded from the host before their turn.",
    ),
    Metric(
        "conserve:checkpoint_pinned_tokens",
        "checkpoint.pinned_tokens",
        "Tokens of waiting offline requests that the host cache must keep.",
    ),
    Metric(
        "conserve:checkpoint_host_full_total",
        "checkpoint.host_full",
        "Checkpoints that found no room in the host cache.",
    ),
    Metric(
        "conserve:prefill_suspensions_total",
        "slices.suspensions",
        "Times that an offline prefill stopped between two layers for online requests.",
    ),
    Metric(
        "conserve:prefill_layers_given_up_total",
        "slices.layers_given_up",
        "Layers computed for nothing: their suspended prefill had to give its KV away.",
    ),
    Metric(
        "conserve:step_model_bias",
        "latency.bias",
        "Median relative error of the latest predicted steps; above 0 they were slower.",
    ),
    Metric(
        "conserve:step_model_is_biased",
        "latency.is_biased",
        "1 while predictions are off to one side by more than a tenth.",
    ),
    Metric(
        "conserve:online_ttft_seconds",
        "online_s.ttft",
        "Time to first token of online requests, last 5 minutes (status.enabled).",
        label="quantile",
    ),
    Metric(
        "conserve:online_tpot_seconds",
        "online_s.tpot",
        "Time per token after the first of online requests that ended, likewise.",
        label="quantile",
    ),
    Metric(
        "conserve:online_itl_seconds",
        "online_s.itl",
        "Time between two tokens of an online request, likewise.",
        label="quantile",
    ),
    Metric(
        "conserve:online_arrivals_total",
        "arrivals_received",
        "Online requests that were announced before they were tokenized.",
    ),
)
"""Every metric but the histogram ARRIVAL_LATENCY."""

ARRIVAL_LATENCY = Metric(
    "conserve:arrival_latency_seconds",
    "arrival_ms",
    "From an online request's arrival to the scheduler's look at its announcement.",
)
_LATENCY_BUCKETS_S = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)


class Exporter:
    """Writes the state to Prometheus.

    Args:
        labels: SGLang's label values, `SchedulerMetricsCollector.labels`.
    """

    def __init__(self, labels: Mapping[str, Any]) -> None:
        # Not at the module's top: it must come after SGLang has set PROMETHEUS_MULTIPROC_DIR.
        from prometheus_client import Counter, Gauge, Histogram

        # One number for both classes has no priority of its own.
        self._labels = {key: str(value) for key, value in labels.items() if key != "priority"}
        names = list(self._labels)
        self._series: dict[str, Any] = {}
        for metric in METRICS:
            labelnames = [*names, metric.label] if metric.label else names
            self._series[metric.name] = (
                Counter(metric.name, metric.help, labelnames)
                if metric.kind == "counter"
                else Gauge(metric.name, metric.help, labelnames, multiprocess_mode="mostrecent")
            )
        self._latency = Histogram(
            ARRIVAL_LATENCY.name, ARRIVAL_LATENCY.help, names, buckets=_LATENCY_BUCKETS_S
        ).labels(**self._labels)
        self._counted: dict[tuple[str, str | None], float] = {}
        self._due_s = 0.0

    def is_due(self, now_s: float) -> bool:
        """Whether the last `write` is a second ago."""
        return now_s >= self._due_s

    def write(self, now_s: float, state: Mapping[str, Any], latencies_ms: Iterable[float]) -> None:
        """Write `state`, which has every key of METRICS, and the latencies that are new."""
        self._due_s = now_s + 1.0
        for metric in METRICS:
            value = metric.value_in(state)
            for label, number in value.items() if metric.label else [(None, value)]:
                self._write_one(metric, label, number)
        for latency_ms in latencies_ms:
            self._latency.observe(latency_ms / 1000)

    def _write_one(self, metric: Metric, label: str | None, number: float | None) -> None:
        extra = {} if metric.label is None else {metric.label: label}
        child = self._series[metric.name].labels(**self._labels, **extra)
        if metric.kind == "gauge":
            child.set(nan if number is None else number)
        else:
            before = self._counted.get((metric.name, label), 0)
            self._counted[metric.name, label] = number
            child.inc(number - before)
