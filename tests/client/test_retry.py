from __future__ import annotations

import random

import pytest

from conserve_sgl.client.clock import Clock
from conserve_sgl.client.retry import (
    Attempts,
    Passing,
    Retry,
    RetryRule,
    backoff_s,
    retry_after_s,
)

WALL_S = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


class StoppedClock(Clock):
    def wall_s(self) -> float:
        return WALL_S


def rule(**retry: float) -> RetryRule:
    numbers = {"first_delay_s": 1, "max_delay_s": 8} | retry
    return RetryRule(Retry(**numbers), clock=StoppedClock(), rng=random.Random(0))


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (429, Passing.BUSY),
        (503, Passing.BUSY),
        *((status, Passing.LOST) for status in (408, 500, 502, 504)),
        *((status, None) for status in (200, 400, 401, 404, 405, 413, 501, 505)),
    ],
)
def test_what_a_status_means(status, why):
    assert Passing.of(status) is why


def test_a_busy_server_is_asked_again_without_limit():
    attempts, busy = Attempts(), rule(max_attempts=1)
    for _ in range(100):
        assert busy.wait_s(Passing.BUSY, attempts) <= 8
    assert (attempts.busy, attempts.lost) == (100, 0)


def test_what_was_refused_at_one_time_comes_back_after_the_time_asked_for_and_not_at_once():
    busy = rule()
    waits = [busy.wait_s(Passing.BUSY, Attempts(), "17") for _ in range(50)]
    assert 17.5 <= min(waits) < 17.6
    assert 17.9 < max(waits) <= 18
    assert len(set(waits)) == 50


def test_what_was_lost_too_often_has_failed_however_often_the_server_was_busy_between():
    attempts, lost = Attempts(), rule(max_attempts=3)
    assert lost.wait_s(Passing.LOST, attempts) <= 1
    assert lost.wait_s(Passing.BUSY, attempts, "5") >= 5.5
    assert 1 <= lost.wait_s(Passing.LOST, attempts) <= 2
    assert lost.wait_s(Passing.LOST, attempts) is None
    assert (attempts.busy, attempts.lost) == (1, 3)


def test_backoff_doubles_to_its_cap_with_half_of_it_at_random():
    retry = Retry(first_delay_s=1, max_delay_s=10)
    rng = random.Random(1)
    for failures, ceiling in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (5000, 10)]:
        delays = [backoff_s(retry, failures, rng) for _ in range(200)]
        assert ceiling / 2 <= min(delays) < ceiling * 0.6
        assert ceiling * 0.9 < max(delays) <= ceiling


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("Tue, 14 Nov 2023 22:13:00 GMT", 0.0),
    ],
)
def test_retry_after(value, seconds):
    assert retry_after_s(value, WALL_S) == seconds
