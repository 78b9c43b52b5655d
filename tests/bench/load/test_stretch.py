"""Benchmarks in the stretched time of an emulated device."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from conserve_sgl.bench.load.arrivals import Arrival
from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.load.stretch import (
    device_counters,
    device_record,
    host_arrivals,
    host_conserve,
)
from conserve_sgl.bench.report.metrics import Slo, attained, itls_s, tpot_s, ttft_s
from conserve_sgl.config import ConserveConfig, SloConfig


def test_arrivals_come_later() -> None:
    arrivals = (Arrival(0.5, 10, 2), Arrival(2.0, 7, 3, (1, 2), 4))

    assert host_arrivals(arrivals, 4) == (Arrival(2.0, 10, 2), Arrival(8.0, 7, 3, (1, 2), 4))


@pytest.mark.parametrize(
    ("slo", "stretched"),
    [
        ({}, {"ttft": "2x", "tpot": "2x", "longest_gap": "200.000000ms", "yield_ms": 20.0}),
        (
            {"ttft": "500ms", "longest_gap": "3x"},
            {"ttft": "2000.000000ms", "tpot": "2x", "longest_gap": "3x", "yield_ms": 20.0},
        ),
        (
            {"ttft": "2x", "tpot": "30ms", "yield_ms": 50},
            {
                "ttft": "2x",
                "tpot": "120.000000ms",
                "longest_gap": "240.000000ms",
                "yield_ms": 200.0,
            },
        ),
    ],
)
def test_conserve_is_told_its_objectives_in_the_time_of_its_clock(
    slo: dict[str, Any], stretched: dict[str, Any]
) -> None:
    section = {"checkpoint": {"enabled": False}, "slo": slo}

    told = host_conserve(section, 4.0)

    assert told == {"checkpoint": {"enabled": False}, "slo": stretched}
    assert msgspec.convert(told, ConserveConfig).slo == SloConfig(**stretched)
    assert host_conserve(section, 1.0) == section


def test_a_section_without_objectives_gets_the_stretched_defaults() -> None:
    assert host_conserve({}, 2.0)["slo"]["yield_ms"] == 2 * SloConfig().yield_ms


def test_what_was_seen_of_a_request_is_told_in_device_time() -> None:
    seen = RequestRecord("online", 4.0, 4.4, 12.4, (6.4, 8.4, 12.4), (1, 2, 1), 100, 7, None)

    record = device_record(seen, 4.0)

    assert ttft_s(record) == pytest.approx(0.5)
    assert tpot_s(record) == pytest.approx(0.5)
    assert itls_s(record) == pytest.approx([0.25, 0.25, 1.0])
    assert record.lateness_s == pytest.approx(0.1)
    assert (record.prompt_tokens, record.cached_tokens, record.chunk_tokens) == (100, 7, (1, 2, 1))
    assert attained(record, Slo(501, 501))
    assert not attained(seen, Slo(501, 501))
    unfinished = msgspec.structs.replace(seen, done_s=None, error="gone")
    assert device_record(unfinished, 4.0).done_s is None


def test_only_counters_with_a_unit_of_time_are_divided() -> None:
    shown = {
        "offline_tokens.output": 40,
        "latency.coefficients_s.step": 0.04,
        "slices.arrival_to_yield_ms.p99": 8.0,
        "checkpoint.checkpoint_ns": 400,
        "latency.errors.decode.upper": 1.4,
        "slo.yield_ms": 20.0,
    }

    assert device_counters(shown, 4.0) == {
        "offline_tokens.output": 40,
        "latency.coefficients_s.step": 0.01,
        "slices.arrival_to_yield_ms.p99": 2.0,
        "checkpoint.checkpoint_ns": 100.0,
        "latency.errors.decode.upper": 1.4,
        "slo.yield_ms": 5.0,
    }
    assert device_counters(shown, 1.0) == shown


def test_a_count_of_time_stays_a_count() -> None:
    """Of which a run tells what was added within the window."""
    (number,) = device_counters({"checkpoint.checkpoint_ns": 402}, 4.0).values()
    assert (type(number), number) == (int, 100)
