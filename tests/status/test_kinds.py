"""What a step was, and the share of the time of each kind."""

from __future__ import annotations

import pytest

from conserve_sgl.status.kinds import KINDS, kind_of, shares
from status.examples import step


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"online_prompt_tokens": 5, "online_rows": 3, "offline_rows": 4}, "online prompts"),
        ({"offline_prompt_tokens": 5, "sliced": True}, "offline prompts in slices"),
        ({"offline_prompt_tokens": 5}, "offline prompts"),
        ({"offline_prompt_tokens": 5, "online_rows": 1}, "offline prompts beside rows"),
        ({"online_rows": 1, "offline_rows": 1}, "online and offline rows"),
        ({"online_rows": 1}, "online rows"),
        ({"offline_rows": 1}, "offline rows"),
    ],
)
def test_a_step_is_one_of_the_kinds(fields, kind):
    assert kind_of(step(0, **fields)) == kind
    assert kind in KINDS


def test_shares_are_of_the_time_that_went_by():
    steps = [
        step(0, online_rows=1, seconds=1.0),
        step(1, offline_rows=1, seconds=2.0, idle_s=0.5),
        step(2, offline_rows=1, seconds=None, idle_s=0.5),
    ]
    assert shares(steps) == {"online rows": 0.25, "offline rows": 0.5, "idle": 0.25}


def test_without_time_there_are_no_shares():
    assert shares([]) == shares([step(0, seconds=None)]) == {}
