from __future__ import annotations

import pytest

from conserve_sgl.batch.server.share import Claim, next_batch

NOW = 1000.0


def claim(window_s: float, in_flight: int = 0, left: int = 100) -> Claim:
    return Claim(NOW + window_s, in_flight, left)


@pytest.mark.parametrize(
    ("claims", "rate", "turn"),
    [
        pytest.param([claim(9)], 0, 0, id="one batch"),
        pytest.param([claim(9000, 3), claim(9000, 2)], 1, 1, id="the one with less in flight"),
        pytest.param([claim(9000, 2), claim(8000, 2)], 1, 1, id="a tie: the earlier deadline"),
        pytest.param([claim(9000, 0), claim(150, 9)], 1, 1, id="urgent: 100 lines at 0.5/s"),
        pytest.param([claim(9000, 0), claim(300, 9)], 1, 0, id="not urgent: 200 s of 300"),
        pytest.param([claim(9000, 0), claim(150, 9)], 0, 0, id="at an unknown rate none is urgent"),
        pytest.param([claim(150, 0), claim(120, 9)], 1, 1, id="two urgent: the earlier deadline"),
        pytest.param([claim(-5, 9), claim(9000, 0)], 1, 0, id="past its deadline"),
    ],
)
def test_whose_turn_it_is(claims, rate, turn):
    assert next_batch(claims, rate, NOW) == turn


def test_slots_are_shared_out_evenly():
    in_flight = [0, 0, 0]
    for _ in range(30):
        turn = next_batch([claim(90_000, n, 10_000) for n in in_flight], 0, NOW)
        in_flight[turn] += 1
    assert in_flight == [10, 10, 10]
