"""When offline prompts that found no KV are tried again."""

from __future__ import annotations

import pytest

from conserve_sgl.engine.shortage import Shortage


@pytest.fixture
def short() -> Shortage:
    shortage = Shortage()
    shortage.note(1000, found_no_kv=True)
    return shortage


def test_nothing_is_short_before_a_prompt_found_no_kv():
    assert not Shortage().lasts(0)


def test_prompts_are_tried_again_once_more_is_free(short):
    assert short.lasts(1000)
    assert short.lasts(990)
    assert not short.lasts(1001)


def test_prompts_are_tried_again_after_a_few_steps_although_nothing_came_free(short):
    assert [short.lasts(1000) for _ in range(8)] == [True] * 7 + [False]
    short.note(900, found_no_kv=True)
    assert [short.lasts(900) for _ in range(8)] == [True] * 7 + [False]


def test_a_prompt_that_found_kv_ends_the_shortage(short):
    short.note(400, found_no_kv=False)
    assert not short.lasts(0)
