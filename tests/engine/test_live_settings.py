"""Settings of a server that runs: all that is asked for changes, or nothing."""

from __future__ import annotations

import warnings

import pytest

from conserve_sgl.config import ConserveConfig
from conserve_sgl.settings import OfflineWork
from conserve_sgl.status.record import Capability

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang warns about absent GPU kernels while it is imported
    from conserve_sgl.engine.capabilities import Capabilities
    from conserve_sgl.engine.host import SetInternalStateReq, SetInternalStateReqOutput
    from conserve_sgl.engine.live_settings import LiveSettings


class Sglang:
    """Its own `set_internal_state`, which takes what it is told to, or does not."""

    def __init__(self, *, takes: bool = True) -> None:
        self.takes = takes
        self.asked: list[dict] = []

    def __call__(self, recv_req: SetInternalStateReq) -> SetInternalStateReqOutput:
        self.asked.append(recv_req.server_args)
        return SetInternalStateReqOutput(updated=self.takes)


@pytest.fixture
def live() -> LiveSettings:
    config, nothing = ConserveConfig(), Capability("", False, "", "")
    return LiveSettings(config, Capabilities(nothing, nothing, nothing, nothing))


@pytest.fixture
def aimed(live) -> list:
    aimed = []
    live.on_change(aimed.append)
    return aimed


def change(live: LiveSettings, sglang: Sglang, **numbers: float) -> bool:
    return live.change(SetInternalStateReq(server_args=numbers), sglang).updated


def test_whoever_acts_by_them_is_told_of_objectives_that_change(live, aimed):
    sglang = Sglang()
    assert change(live, sglang, conserve_tpot_ms=80, conserve_offline=0)
    assert (live.now.slo.tpot, live.now.offline) == ("80ms", OfflineWork.PAUSED)
    assert live.slo == live.now.slo.objectives()
    assert aimed == [live.now.slo]
    assert change(live, sglang, conserve_tpot_ms=80)
    assert len(aimed) == 1  # as they were
    assert sglang.asked == []  # nothing of its own


def test_a_setting_that_cannot_be_changes_nothing_of_sglang_s_either(live, aimed):
    sglang, before = Sglang(), live.now
    assert not change(live, sglang, conserve_tpot_ms=-1, pp_max_micro_batch_size=8)
    assert (live.now, aimed, sglang.asked) == (before, [], [])


def test_what_sglang_does_not_take_changes_nothing_of_ours_either(live, aimed):
    sglang, before = Sglang(takes=False), live.now
    assert not change(live, sglang, conserve_tpot_ms=80, pp_max_micro_batch_size=8)
    assert (live.now, aimed) == (before, [])
    assert sglang.asked == [{"pp_max_micro_batch_size": 8}]  # without ours, which it does not know
