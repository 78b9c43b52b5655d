"""What may change while a server runs, and the numbers that carry it."""

from __future__ import annotations

from math import inf

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.config import SloConfig
from conserve_sgl.errors import SettingError
from conserve_sgl.settings import (
    OfflineWork,
    Settings,
    batches_number,
    is_setting,
    offline_number,
    slo_numbers,
)

START = Settings(SloConfig(ttft="1500ms", tpot="1.25x", yield_ms=5.0))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"ttft": "200ms"},
        {"ttft": "1.5x", "tpot": "33.3ms"},
        {"tpot": "3600000ms", "yield_ms": 0.5},
    ],
)
def test_objectives_arrive_as_they_were_written(asked):
    numbers = slo_numbers(**asked)
    assert all(map(is_setting, numbers))
    slo = START.changed_by(numbers).slo
    assert {key: getattr(slo, key) for key in asked} == asked
    rest = {"ttft", "tpot", "yield_ms"} - set(asked)
    assert all(getattr(slo, key) == getattr(START.slo, key) for key in rest)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"ttft": "200"}, "ttft: '200' is not an objective"),
        ({"tpot": "0.9x"}, "1x or more"),
        ({"tpot": "0ms"}, "a time above 0"),
        ({"yield_ms": 0}, "yield_ms"),
        ({"yield_ms": inf}, "yield_ms"),
        ({"yield_ms": float("nan")}, "yield_ms"),
    ],
)
def test_what_the_configuration_would_not_take_is_not_sent(asked, reason):
    with pytest.raises(SettingError, match=reason):
        slo_numbers(**asked)


def test_offline_work_is_paused_and_runs_again():
    paused = START.changed_by(offline_number(OfflineWork.PAUSED))
    assert paused.offline is OfflineWork.PAUSED
    assert paused.slo == START.slo
    assert paused.changed_by({"conserve_offline": 1.0}) == START


def test_batches_are_held_and_sent_again():
    held = START.changed_by(batches_number(held=True))
    assert held.batches_held
    assert held.changed_by(slo_numbers(yield_ms=1.0)).batches_held
    assert held.changed_by(batches_number(held=False)) == START


def test_nothing_runs_again_in_a_server_that_ends():
    ended = START.changed_by(offline_number(OfflineWork.ENDS))
    for work in OfflineWork:
        assert ended.changed_by(offline_number(work)).offline is OfflineWork.ENDS


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"conserve_offline": 3}, "conserve_offline is 0, 1 or 2, not 3"),
        ({"conserve_offline": 0.5}, "not 0.5"),
        ({"conserve_batches": 2}, "conserve_batches is 0 or 1"),
        ({"conserve_batches": "run"}, "conserve_batches is 0 or 1"),
        ({"conserve_tpot": 1.5}, "conserve_tpot is no setting"),
        ({"conserve_tpot_s": 1.5}, "conserve_tpot_s is no setting"),
        ({"conserve_queue_requests": 1}, "conserve_queue_requests is no setting"),
        ({"conserve_tpot_x": float("nan")}, "conserve_tpot_x is a number from"),
        ({"conserve_yield_ms": float("inf")}, "conserve_yield_ms is a number from"),
        ({"conserve_yield_ms": 1e300}, "conserve_yield_ms is a number from"),
        ({"conserve_ttft_ms": "fast"}, "conserve_ttft_ms is a number from"),
        ({"conserve_ttft_ms": None}, "conserve_ttft_ms is a number from"),
        ({"conserve_offline": [1]}, "conserve_offline is a number from"),
        ({"conserve_offline": True}, "conserve_offline is a number from"),
        ({"conserve_yield_ms": -1.0}, "yield_ms"),
    ],
)
def test_what_is_no_setting_or_cannot_hold_is_refused(numbers, reason):
    with pytest.raises(SettingError, match=reason):
        START.changed_by(numbers)


def test_the_names_of_sglang_are_left_to_it():
    assert not is_setting("pp_max_micro_batch_size")


@given(
    st.sampled_from(
        ["offline", "ttft_ms", "ttft_x", "tpot_ms", "tpot_x", "yield_ms", "", "ttft", "offline_x"]
    ),
    st.floats() | st.integers() | st.integers(10**300, 10**310) | st.text() | st.none(),
)
def test_whatever_a_client_sends_is_a_setting_or_an_error_of_ours(name, value):
    try:
        slo = START.changed_by({f"conserve_{name}": value}).slo
    except SettingError:
        return
    assert 0 < slo.yield_ms < inf
    for objective in (slo.objectives().ttft, slo.objectives().tpot):
        assert all(0 < number < inf for number in msgspec.structs.astuple(objective))
