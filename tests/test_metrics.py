"""docs/metrics.md lists every metric, and what is written is what the state says."""

from __future__ import annotations

import json
import re
from math import isnan

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from conserve_sgl.engine.ledger import OfflineLedger
from conserve_sgl.engine.metrics import ARRIVAL_LATENCY, METRICS, Exporter
from conserve_sgl.ingress.hooks import refusal_counter
from conserve_sgl.policy import OfflineQueue

LABELS = {"model_name": "m", "tp_rank": 0, "priority": ""}
OF_HTTP = "conserve:offline_http_refused_total"


@pytest.fixture
def registry(monkeypatch) -> CollectorRegistry:
    """A registry of its own in place of the process's."""
    import prometheus_client

    registry = CollectorRegistry()
    for name in ("Counter", "Gauge", "Histogram"):
        kind = getattr(prometheus_client, name)
        monkeypatch.setattr(
            prometheus_client,
            name,
            lambda *a, kind=kind, **k: kind(*a, registry=registry, **k),
        )
    return registry


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Every sample by its name, with the value of the label that is not SGLang's."""
    text = generate_latest(registry).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            extra = [v for k, v in sample.labels.items() if k not in LABELS]
            found[" ".join([sample.name, *extra])] = sample.value
            assert sample.labels["model_name"] == "m"
            assert "priority" not in sample.labels
    return found


def state(**changed: object) -> dict[str, object]:
    numbers: dict[str, object] = {"offline_tokens": {"computed": 0, "output": 0}}
    for metric in METRICS:
        part, _, key = metric.key.rpartition(".")
        none = {} if metric.label else 0
        (numbers.setdefault(part, {}) if part else numbers).setdefault(key, none)
    return {**numbers, **changed}


def test_gauges_follow_and_counters_count_up(registry):
    exporter = Exporter(LABELS)
    exporter.write(0.0, state(offline_waiting=3, offline_refused=2), [])
    exporter.write(1.0, state(offline_waiting=1, offline_refused=5), [])
    written = samples(registry)
    assert written["conserve:offline_queue_reqs"] == 1
    assert written["conserve:offline_refused_total"] == 5


def test_tokens_are_told_apart_by_kind(registry):
    exporter = Exporter(LABELS)
    exporter.write(0.0, state(offline_tokens={"computed": 7, "output": 2}), [])
    exporter.write(1.0, state(offline_tokens={"computed": 9, "output": 2}), [])
    written = samples(registry)
    assert written["conserve:offline_tokens_total computed"] == 9
    assert written["conserve:offline_tokens_total output"] == 2


def test_bounds_and_quantiles_have_labels_of_their_own(registry):
    exporter = Exporter(LABELS)
    online = {"ttft": {"0.5": 0.2, "0.99": None}, "tpot": {}, "itl": {}}
    exporter.write(0.0, state(offline_bound_s={"kv": 3.0, "paused": 0.0}, online_s=online), [])
    exporter.write(1.0, state(offline_bound_s={"kv": 4.5, "paused": 0.0}, online_s=online), [])
    written = samples(registry)
    assert written["conserve:offline_bound_seconds_total kv"] == 4.5
    assert written["conserve:offline_bound_seconds_total paused"] == 0
    assert written["conserve:online_ttft_seconds 0.5"] == 0.2
    assert isnan(written["conserve:online_ttft_seconds 0.99"])
    assert not any(name.startswith("conserve:online_itl") for name in written)


def test_latencies_are_seconds_in_a_histogram(registry):
    Exporter(LABELS).write(0.0, state(), [0.4, 30.0])
    written = samples(registry)
    assert written["conserve:arrival_latency_seconds_count"] == 2
    assert written["conserve:arrival_latency_seconds_sum"] == pytest.approx(0.0304)
    assert written["conserve:arrival_latency_seconds_bucket 0.0005"] == 1


@pytest.mark.usefixtures("registry")
def test_it_is_due_once_a_second():
    exporter = Exporter(LABELS)
    assert exporter.is_due(5.0)
    exporter.write(5.0, state(), [])
    assert not exporter.is_due(5.9)
    assert exporter.is_due(6.0)


def test_refusals_at_the_door_are_counted_from_zero_on(registry):
    count = refusal_counter("m")
    assert samples(registry)[OF_HTTP] == 0
    count()
    assert samples(registry)[OF_HTTP] == 1


def test_the_ledger_s_state_has_what_is_exported():
    ledger = OfflineLedger(OfflineQueue(1), lambda _req: True)
    keys = {m.key for m in METRICS if "." not in m.key}
    keys -= {"arrivals_received", "offline_paused", "offline_starved_s"}  # the scheduler's own
    keys -= {"offline_bound_s", "offline_tokens_per_s", "offline_alone_tokens_per_s"}
    assert keys == set(ledger.state(0.0, parked=0))


def test_the_page_lists_every_metric_with_its_type_and_key(checkout):
    page = (checkout / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(conserve:\w+)` \| (\w+) \| (?:`([\w.]+)`)?", page, re.MULTILINE)
    expected = [(m.name, m.kind, m.key) for m in METRICS]
    expected.append((ARRIVAL_LATENCY.name, "histogram", ARRIVAL_LATENCY.key))
    expected.append((OF_HTTP, "counter", ""))
    assert sorted(rows) == sorted(expected)
    named = set(re.findall(r"conserve:\w+", page))
    assert named == {name for name, *_ in expected}


def test_the_dashboard_asks_only_for_metrics_that_there_are(checkout):
    dashboard = json.loads((checkout / "docs" / "grafana.json").read_text())
    targets = [one for panel in dashboard["panels"] for one in panel.get("targets", ())]
    asked = [target["expr"] for target in targets]
    there = {m.name for m in METRICS} | {f"{ARRIVAL_LATENCY.name}_bucket", OF_HTTP}
    named = {name for expr in asked for name in re.findall(r"conserve:\w+", expr)}
    assert named <= there
    assert len(named) > 25


def test_the_alerts_ask_only_for_metrics_that_there_are_and_each_is_explained(checkout):
    (group,) = yaml.safe_load((checkout / "docs" / "alerts.yaml").read_text())["groups"]
    there = {m.name for m in METRICS} | {f"{ARRIVAL_LATENCY.name}_bucket"}
    for rule in group["rules"]:
        named = set(re.findall(r"conserve:\w+", rule["expr"]))
        assert named
        assert named <= there
    page = (checkout / "docs" / "operations.md").read_text()
    explained = re.findall(r"^\| `(Conserve\w+)` \|", page, re.MULTILINE)
    assert sorted(explained) == sorted(rule["alert"] for rule in group["rules"])
    assert set(re.findall(r"conserve:\w+", page)) <= there
