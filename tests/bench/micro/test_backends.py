"""Comparing the answers of two attention backends; the answers themselves come from engines."""

from __future__ import annotations

from math import inf

import pytest

from conserve_sgl.bench.micro import backends
from conserve_sgl.bench.micro.backends import AGREE_NATS, Answer, compare, prompts


def answer(*tokens: int, logprob: float = -1.0, second: dict[int, float] | None = None) -> Answer:
    """Each of `tokens` with the same logprob; `second` are others that were likely everywhere."""
    top = tuple({token: logprob, **(second or {})} for token in tokens)
    return Answer(tokens, (logprob,) * len(tokens), top)


SAME = [answer(1, 2, 3, 4, 5, 6)] * 2


def test_equal_answers_agree():
    found = compare(SAME, SAME)
    assert (found.prompts, found.same, found.compared_tokens) == (2, 2, 12)
    assert found.agrees


def test_a_tie_may_be_broken_either_way():
    one = answer(1, 2, 3, 4, 5, 6, second={9: -1.1})
    other = answer(1, 2, 3, 4, 9, 7, second={5: -1.05})
    found = compare([one], [other])
    assert found.same == 0
    assert found.compared_tokens == 4
    assert found.widest_tie == pytest.approx(0.1)
    assert found.agrees


def test_another_token_that_is_far_off_for_one_of_them_is_another_answer():
    one = answer(1, 2, 3, 4, 5, second={9: -1.1})
    other = answer(1, 2, 3, 4, 9, second={5: -1.1 - AGREE_NATS})
    assert not compare([one], [other]).agrees


def test_a_token_that_is_not_even_likely_is_another_answer():
    found = compare([answer(1, 2, 3, 4, 5)], [answer(1, 2, 3, 4, 9)])
    assert found.widest_tie == inf
    assert not found.agrees


def test_the_same_tokens_with_other_logprobs_are_another_answer():
    found = compare([answer(1, 2, 3, 4)], [answer(1, 2, 3, 4, logprob=-1.9)])
    assert found.same == 1
    assert found.logprob_difference == pytest.approx((0.9, 0.9))
    assert not found.agrees


def test_answers_that_part_at_once_are_not_taken_for_ties():
    close = dict.fromkeys(range(20), -1.01)
    one, other = answer(1, 2, 3, second=close), answer(11, 12, 13, second=close)
    assert not compare([one] * 8, [other] * 8).agrees


def test_every_second_prompt_goes_on_from_the_one_before():
    made = prompts(6, 100)
    assert len(made) == 6
    for first, second in zip(made[::2], made[1::2], strict=True):
        half = len(first) // 2
        assert second[:half] == first[:half]
        assert second != first


@pytest.mark.parametrize(
    ("found", "faults", "use"),
    [
        ({"triton": (1.0, SAME), "fa3": (1.0, SAME)}, {}, "fa3"),
        ({"triton": (1.0, SAME), "fa3": (1.0, [SAME[0], answer(9)])}, {}, "triton"),
        ({"triton": (1.0, SAME)}, {"fa3": "no kernel"}, "triton"),
        ({"fa3": (1.0, SAME)}, {"triton": "does not start"}, "fa3"),
        ({}, {"triton": "no", "fa3": "no"}, "triton"),
    ],
    ids=["alike", "different", "candidate fails", "reference fails", "both fail"],
)
def test_the_candidate_is_taken_if_it_answers_right(found, faults, use):
    assert backends._report("triton", "fa3", found, faults)["use"] == use
