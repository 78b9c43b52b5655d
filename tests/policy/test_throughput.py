"""Offline tokens a second, and what the engine would do alone."""

from __future__ import annotations

import pytest

from conserve_sgl.policy import Rows, StepView, StepWork
from conserve_sgl.policy.throughput import Throughput, alone_tokens_per_s


def predict_s(work: StepWork) -> float:
    """A millisecond for ten prompt tokens; ten for a decode step, and one for each row."""
    rows = 0.010 + 0.001 * work.decode_rows if work.decode_rows else 0.0
    return work.prefill_tokens / 10_000 + rows


def view(rows: int = 8, context: int = 100, **more) -> StepView:
    known = {"max_rows": 10, "chunk_tokens": 100, "total_kv_tokens": 100_000, **more}
    return StepView(now_s=0.0, offline_decoding=Rows(rows, rows * context), **known)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 10_000), (0.0, 500), (0.5, 20_000 / 21)])
def test_prompts_and_answers_take_their_time_in_turn(share, expected):
    """10,000 prompt tokens a second, or 10 rows in 20 ms; half and half, one of each in 2.1 ms."""
    got = alone_tokens_per_s(
        predict_s, prompt_share=share, rows=10, context_tokens=100, chunk_tokens=100
    )
    assert got == pytest.approx(expected)


def test_a_model_that_knows_no_time_says_nothing():
    got = alone_tokens_per_s(
        lambda _: 0.0, prompt_share=0.5, rows=1, context_tokens=1, chunk_tokens=1
    )
    assert got is None


def test_it_follows_what_is_served():
    throughput = Throughput()
    assert throughput.tokens_per_s is None
    for second in range(120):
        throughput.look(float(second), view(), computed=30 * second, output=10 * second)
    assert throughput.tokens_per_s == pytest.approx(40)
    assert throughput.alone_tokens_per_s(predict_s, view()) == pytest.approx(
        1 / (0.75 / 10_000 + 0.25 * 0.020 / 10)
    )


def test_rows_are_bounded_by_the_kv_pool():
    throughput = Throughput()
    for second in range(3):
        throughput.look(float(second), view(context=1000), computed=0, output=10 * second)
    small = view(total_kv_tokens=4000, context=1000)
    assert throughput.alone_tokens_per_s(predict_s, small) == pytest.approx(4 / 0.014)


def test_nobody_knows_before_anything_was_served_and_the_mix_of_before_stays():
    throughput = Throughput()
    throughput.look(0.0, view(rows=0), computed=0, output=0)
    throughput.look(1.0, view(rows=0), computed=0, output=0)
    assert throughput.tokens_per_s == 0.0
    assert throughput.alone_tokens_per_s(predict_s, view()) is None
    throughput.look(2.0, view(), computed=0, output=50)
    for second in range(3, 600):
        throughput.look(float(second), view(rows=0), computed=0, output=50)
    assert throughput.tokens_per_s == pytest.approx(0.0, abs=1e-6)
    assert throughput.alone_tokens_per_s(predict_s, view()) == pytest.approx(500)
