"""Latencies of the last minutes, against those of a plain list."""

from __future__ import annotations

import random

import numpy
import pytest

from conserve_sgl.status.latency import NO_QUANTILES, WINDOW_S, LatencyWindow, OnlineLatencies


@pytest.mark.parametrize("scale", [1e-3, 0.1, 30.0])
def test_percentiles_are_right_to_within_two_hundredths(scale):
    window, rng = LatencyWindow(), random.Random(7)
    samples = [scale * rng.lognormvariate(0, 1) for _ in range(5000)]
    for sample in samples:
        window.add(100.0, sample)
    seen = window.read(100.0, scale)
    assert seen.samples == 5000
    assert seen.p50_ms == pytest.approx(1e3 * numpy.percentile(samples, 50), rel=0.02)
    assert seen.p99_ms == pytest.approx(1e3 * numpy.percentile(samples, 99), rel=0.02)
    assert seen.within == pytest.approx(numpy.mean([s <= scale for s in samples]), abs=0.02)


def test_without_samples_nobody_knows():
    seen = LatencyWindow().read(100.0, 0.5)
    assert (seen.p50_ms, seen.p99_ms, seen.samples, seen.within) == (None, None, 0, None)
    assert seen.objective_ms == 500


def test_without_an_objective_nothing_is_within_it():
    window = LatencyWindow()
    window.add(100.0, 0.1)
    assert window.read(100.0, None).within is None


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9, 1e9, float("inf")])
def test_no_time_is_too_short_or_too_long_to_be_counted(seconds):
    window = LatencyWindow()
    window.add(100.0, seconds)
    assert window.read(100.0, 1.0).samples == 1


def test_what_is_older_than_the_window_is_gone():
    window = LatencyWindow()
    window.add(0.0, 1.0)
    window.add(200.0, 2.0)
    assert window.read(269.0, None).samples == 2
    assert window.read(301.0, None).samples == 1
    assert window.read(301.0, None).p50_ms == pytest.approx(2000, rel=0.02)
    window.add(400.0, 3.0)
    assert window.read(200.0 + WINDOW_S + 30, None).samples == 1
    assert window.read(1e6, None).samples == 0


def test_rows_that_decode_together_wait_together():
    """Three rows over four steps; one of them comes later."""
    seen = OnlineLatencies()
    for at_s in (10.0, 10.0):
        seen.first_token(at_s, 0.5, goes_on=True)
    seen.decoded(10.1, 2)
    seen.first_token(10.1, 0.7, goes_on=True)
    seen.decoded(10.4, 3)
    seen.decoded(10.5, 3)
    itl = seen.itl.read(11.0, 0.15)
    assert itl.samples == 2 + 3 + 3
    assert itl.within == pytest.approx(5 / 8)
    assert seen.ttft.read(11.0, None).samples == 3


def test_a_row_that_comes_after_a_pause_did_not_wait_through_it():
    seen = OnlineLatencies()
    seen.first_token(10.0, 0.5, goes_on=True)
    seen.decoded(10.1, 1)
    seen.first_token(60.0, 0.5, goes_on=True)
    seen.decoded(60.2, 1)
    assert seen.itl.read(61.0, None).p99_ms == pytest.approx(200, rel=0.02)


def test_answers_of_one_token_wait_for_no_other():
    seen = OnlineLatencies()
    for _ in range(10_000):
        seen.first_token(10.0, 0.5, goes_on=False)
        seen.ended(10.0, None)
    assert seen._fresh == []
    assert (seen.itl.read(11.0, None).samples, seen.tpot.read(11.0, None).samples) == (0, 0)


def test_rows_that_never_decode_do_not_pile_up():
    seen = OnlineLatencies()
    for _ in range(10_000):
        seen.first_token(10.0, 0.5, goes_on=True)
    assert len(seen._fresh) <= 4096


def test_quantiles_are_seconds_and_unknown_without_samples():
    seen = OnlineLatencies()
    seen.first_token(10.0, 0.5, goes_on=False)
    found = seen.quantiles(10.0)
    assert set(found) == set(NO_QUANTILES)
    assert found["ttft"] == pytest.approx({"0.5": 0.5, "0.99": 0.5}, rel=0.02)
    assert found["tpot"] == {"0.5": None, "0.99": None}
