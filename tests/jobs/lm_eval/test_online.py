"""The online latencies of a server, read from what SGLang's `/metrics` says."""

from __future__ import annotations

import pytest

from conserve_sgl.jobs.lm_eval.online import Histogram, compare, read_metrics, snapshot

TTFT = "sglang:time_to_first_token_seconds"


def metrics(name: str, **counts: tuple[int, int, float]) -> str:
    """A histogram with bounds .1 and 1: per priority the counts up to each bound, and the sum."""
    lines = [f"# HELP {name} x", f"# TYPE {name} histogram"]
    for priority, (low, high, total_s) in counts.items():
        label = f'priority="{priority.removeprefix("p").replace("_", "-")}"'
        for bound, count in (("0.1", low), ("1.0", high), ("+Inf", high)):
            lines.append(f'{name}_bucket{{{label},le="{bound}"}} {count}')
        lines += [f"{name}_sum{{{label}}} {total_s}", f"{name}_count{{{label}}} {high}"]
    return "\n".join(lines) + "\n"


def test_offline_requests_are_left_out():
    text = metrics(TTFT, p0=(1, 2, 0.5), p5=(1, 1, 0.05), p_1=(0, 9, 9.0))
    found = read_metrics(text, offline="-1")
    assert found["ttft"].count == 3
    assert found["ttft"].sum_s == pytest.approx(0.55)
    assert found["ttft"].buckets[0.1] == 2
    assert found["tpot"] == Histogram()


def test_a_run_is_what_came_between_two_snapshots():
    before = read_metrics(metrics(TTFT, p0=(4, 4, 0.2)), "-1")
    after = read_metrics(metrics(TTFT, p0=(4, 6, 1.4)), "-1")
    latency = compare(before, after)
    assert (latency.before.requests, latency.during.requests) == (4, 2)
    assert latency.before.ttft_mean_ms == pytest.approx(50)
    assert latency.during.ttft_mean_ms == pytest.approx(600)
    assert latency.during.ttft_p99_ms == pytest.approx(100 + 0.99 * 900)
    assert latency.during.tpot_mean_ms is None


@pytest.mark.parametrize("side", [(None, {}), ({}, None), (None, None)])
def test_without_a_snapshot_there_is_nothing_to_compare(side):
    assert compare(*side) is None


def test_what_lies_above_the_last_bound_is_said_to_lie_there():
    histogram = Histogram(count=2, sum_s=9, buckets={0.1: 1, float("inf"): 2})
    assert histogram.quantile_ms(0.99) == 100


def test_a_server_without_the_metrics_tells_nothing(server):
    assert snapshot([server.url], None) is None
    server.max_req_input_len = 10  # it has /server_info now, with neither flag in it
    assert snapshot([server.url], None) is None


def test_a_server_that_is_away_tells_nothing():
    assert snapshot(["http://127.0.0.1:9"], None) is None
