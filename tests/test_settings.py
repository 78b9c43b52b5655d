"""What may change while a server runs, and the numbers that carry it."""

from __future__ import annotations

import pytest

from conserve_sgl.config import SloConfig
from conserve_sgl.errors import SettingError
from conserve_sgl.settings import (
    OfflineWork,
    Settings,
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


def test_nothing_runs_again_in_a_server_that_ends():
    ended = START.changed_by(offline_number(OfflineWork.ENDS))
    for work in OfflineWork:
        assert ended.changed_by(offline_number(work)).offline is OfflineWork.ENDS


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"conserve_offline": 3}, "conserve_offline is 0, 1 or 2, not 3"),
        ({"conserve_offline": 0.5}, "not 0.5"),
        ({"conserve_tpot": 1.5}, "conserve_tpot is no setting"),
        ({"conserve_tpot_s": 1.5}, "conserve_tpot_s is no setting"),
        ({"conserve_queue_requests": 1}, "conserve_queue_requests is no setting"),
        ({"conserve_tpot_x": float("nan")}, "not an objective"),
        ({"conserve_yield_ms": -1.0}, "yield_ms"),
    ],
)
def test_what_is_no_setting_or_cannot_hold_is_refused(numbers, reason):
    with pytest.raises(SettingError, match=reason):
        START.changed_by(numbers)


def test_the_names_of_sglang_are_left_to_it():
    assert not is_setting("pp_max_micro_batch_size")
