from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.jobs.schema import ExactMatch, LoglikelihoodChoice
from conserve_sgl.jobs.score import (
    ChoiceLogprob,
    extract,
    matches,
    pick_choice,
    shared_prefix_tokens,
    standard_error,
)

NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"


def right(output: str, target: str, **score: object) -> bool:
    rule = ExactMatch(target=target, **score)
    return matches(rule, extract(rule, output), target)


@pytest.mark.parametrize(
    ("output", "target", "score", "expected"),
    [
        ("  Paris\n", "Paris", {}, True),
        ("Paris, France", "Paris", {}, False),
        ("paris", "Paris", {}, False),
        ("paris", "Paris", {"ignore_case": True}, True),
        ("", "", {}, True),
        ("a\nb", "a\nb", {}, True),
        ("3 + 4 = 7. So 7", "7", {"pattern": NUMBER, "match": "last"}, True),
        ("3 + 4 = 7. So 7", "7", {"pattern": NUMBER}, False),
        ("it is 1,234", "1234", {"pattern": NUMBER, "ignore": ","}, True),
        ("it is 1234", "1,234", {"pattern": NUMBER, "ignore": ","}, True),
        ("none", "", {"pattern": NUMBER}, False),
        ("x or b", "b", {"pattern": "x|(b)"}, True),
        ("STRASSE", "straße", {"ignore_case": True}, True),
    ],
)
def test_exact_match(output, target, score, expected):
    assert right(output, target, **score) is expected


@pytest.mark.parametrize(
    ("context", "candidates", "shared"),
    [
        ([1, 2, 3], [[1, 2, 3, 4], [1, 2, 3, 5, 6]], 3),
        ([1, 2, 3], [[1, 2, 3, 4], [1, 2, 9]], 2),  # the second choice merged with the last token
        ([1, 2, 3], [[1, 9], [1, 2, 3, 4]], 1),
        ([1, 2, 3], [[1, 2], [1, 2, 3, 4]], 1),  # at least one token of each is left to score
        ([7], [[8, 9], [7, 9]], 0),
    ],
)
def test_the_shared_prefix_is_what_all_keep(context, candidates, shared):
    assert shared_prefix_tokens(context, candidates) == shared


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(context=tokens, candidates=st.lists(tokens, min_size=2, max_size=5))
def test_the_shared_prefix_is_shared_and_leaves_a_token(context, candidates):
    n = shared_prefix_tokens(context, candidates)
    assert all(c[:n] == context[:n] and len(c) > n for c in candidates)
    longer = [context[: n + 1]] + [c[: n + 1] for c in candidates]
    differ = any(c != longer[0] for c in longer) or len(context) == n
    assert differ or any(len(c) == n + 1 for c in candidates)


@pytest.mark.parametrize(("normalise", "chosen"), [("none", 0), ("tokens", 1), ("bytes", 2)])
def test_choice_by_logprob_by_token_and_by_byte(normalise, chosen):
    score = LoglikelihoodChoice(choices="c", target="t", normalise=normalise)
    logprobs = [
        ChoiceLogprob(logprob=-2.0, tokens=1),  # -2.0 a token, -1.00 a byte
        ChoiceLogprob(logprob=-3.0, tokens=6),  # -0.5 a token, -0.75 a byte
        ChoiceLogprob(logprob=-4.0, tokens=4),  # -1.0 a token, -0.40 a byte
    ]
    # Bytes, not characters: five times two bytes.
    assert pick_choice(score, ["ab", "abcd", "äöüßé"], logprobs) == chosen


def test_an_impossible_choice_is_never_taken_and_ties_go_to_the_first():
    score = LoglikelihoodChoice(choices="c", target="t")
    impossible = ChoiceLogprob(logprob=None, tokens=2)
    likely = ChoiceLogprob(logprob=-900.0, tokens=2)
    assert pick_choice(score, ["a", "b", "c"], [impossible, likely, likely]) == 1


def test_the_standard_error_is_the_binomial_one():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 10) == 0
    assert standard_error(0.2, 0) == 0
    assert not math.isnan(standard_error(0.0, 1))
