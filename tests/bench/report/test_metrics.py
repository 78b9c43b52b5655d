from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.metrics import Slo, attained, itls_s, summarize, tpot_s, ttft_s

Make = Callable[..., RequestRecord]
SLO = Slo(ttft_ms=500, tpot_ms=100)


def test_latencies_of_one_request_by_hand(record: Make) -> None:
    one = record(1.0, (1.4, 1.5, 1.7))

    assert ttft_s(one) == pytest.approx(0.4)
    assert tpot_s(one) == pytest.approx(0.15)
    assert itls_s(one) == pytest.approx([0.1, 0.2])


def test_a_chunk_of_several_tokens_is_as_many_gaps(record: Make) -> None:
    one = record(0.0, (0.4, 1.0), tokens=(2, 3))

    assert itls_s(one) == pytest.approx([0.2, 0.2, 0.2])
    assert tpot_s(one) == pytest.approx(0.6 / 4)


def test_a_single_token_has_no_tpot_and_meets_its_objective(record: Make) -> None:
    one = record(0.0, (0.4,))

    assert tpot_s(one) is None
    assert attained(one, SLO)
    assert math.isnan(summarize([one], 1.0, SLO).tpot_ms.mean)


def test_attainment_is_over_all_sent_and_a_failure_is_a_miss(record: Make) -> None:
    good = record(0.0, (0.5, 0.6))
    slow_start = record(0.0, (0.6, 0.7))
    slow_tokens = record(0.0, (0.1, 0.3))
    aborted = record(0.0, (0.1, 0.2), error="aborted")
    never_began = record(0.0, (), error="did not finish in time")

    summary = summarize([good, slow_start, slow_tokens, aborted, never_began], 10.0, SLO)

    assert (summary.sent, summary.completed, summary.good) == (5, 3, 1)
    assert summary.slo_attainment == pytest.approx(1 / 5)
    assert summary.request_goodput == pytest.approx(0.1)
    assert summary.sglang_keys()["slo_attainment_by_metric"] == {"ttft": 2 / 5, "tpot": 2 / 5}


def test_percentiles_are_numpys(record: Make) -> None:
    records = [record(0.0, (0.001 * i,)) for i in range(1, 101)]

    ttft = summarize(records, 1.0, SLO).ttft_ms

    assert ttft.mean == pytest.approx(50.5)
    assert ttft.median == pytest.approx(50.5)
    assert ttft.p90 == pytest.approx(90.1)
    assert ttft.p99 == pytest.approx(99.01)
    assert ttft.max == pytest.approx(100)


def test_tokens_and_latencies_are_of_completed_requests_only(record: Make) -> None:
    done = record(0.0, (0.5, 0.6, 0.7))
    aborted = record(0.0, (9.0, 9.5), error="aborted")

    keys = summarize([done, aborted], 2.0, SLO).sglang_keys()

    assert keys["completed"] == 1
    assert keys["total_input_tokens"] == 10
    assert keys["total_output_tokens"] == 3
    assert keys["output_throughput"] == pytest.approx(1.5)
    assert keys["total_throughput"] == pytest.approx(6.5)
    assert keys["mean_ttft_ms"] == pytest.approx(500)
    assert keys["max_itl_ms"] == pytest.approx(100)
    assert keys["p99_e2e_latency_ms"] == pytest.approx(700)


def test_no_requests_is_no_number_rather_than_a_good_one() -> None:
    summary = summarize([], 10.0, SLO)

    assert math.isnan(summary.slo_attainment)
    assert math.isnan(summary.ttft_ms.p99)
    assert summary.request_goodput == 0


def test_lateness_of_the_sender_is_measured(record: Make) -> None:
    late = msgspec.structs.replace(record(1.25, (1.5,)), due_s=1.0)

    assert summarize([late], 1.0, SLO).lateness_ms.max == pytest.approx(250)


def test_keys_are_sglangs() -> None:
    latencies = {
        f"{statistic}_{metric}_ms"
        for statistic in ("mean", "median", "std", "p90", "p95", "p99")
        for metric in ("ttft", "tpot", "itl", "e2e_latency")
    }

    keys = set(summarize([], 1.0, SLO).sglang_keys())

    assert keys == latencies | {
        "max_itl_ms",
        "duration",
        "completed",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "input_throughput",
        "output_throughput",
        "total_throughput",
        "goodput_slos_ms",
        "request_goodput",
        "slo_attainment",
        "slo_attainment_by_metric",
    }
