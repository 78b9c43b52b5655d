"""The decision at a layer boundary, as a table of steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy import SliceView, Slicing, Slo, YieldMode
from conserve_sgl.policy.slo import Factor, Seconds

TTFT_500MS = Slo(ttft=Seconds(0.5 / 0.9), tpot=Factor(1.25))  # 0.9 of it is planned with
TTFT_2X = Slo(ttft=Factor(2.0), tpot=Factor(1.25))
EAGER = Slicing(yield_s=0.005, mode=YieldMode.EAGER, slo=TTFT_500MS)
SLACK = Slicing(yield_s=0.005, mode=YieldMode.SLACK, slo=TTFT_500MS)
RELATIVE = Slicing(yield_s=0.005, mode=YieldMode.SLACK, slo=TTFT_2X)


def view(**known) -> SliceView:
    return SliceView(**{"now_s": 100.0, "layers_left": 30, "layer_s": 0.001, **known})


@pytest.mark.parametrize(
    ("policy", "known", "layers"),
    [
        # A slice takes what yield_s holds, and at least a layer.
        (EAGER, {}, 5),
        (EAGER, {"layers_left": 3}, 3),
        (EAGER, {"layer_s": 0.004}, 1),
        (EAGER, {"layer_s": 0.1}, 1),
        # An arrival ends an eager run at once, however much time there is for it.
        (EAGER, {"arrival_s": 99.999}, 0),
        # Slack: the arrival's first token is due at arrival + ttft.
        (SLACK, {"arrival_s": 99.999}, 5),
        (SLACK, {"arrival_s": 99.5035}, 3),
        (SLACK, {"arrival_s": 99.5005}, 0),
        (SLACK, {"arrival_s": 99.0}, 0),
        (SLACK, {"arrival_s": 99.999, "online_s": 0.4965}, 2),
        (SLACK, {"arrival_s": 99.999, "online_s": 0.6}, 0),
        # A relative objective of 2x lets the arrival wait for as long as its prefill takes.
        (RELATIVE, {"arrival_s": 99.999, "online_s": 0.0045}, 3),
        (RELATIVE, {"arrival_s": 99.99, "online_s": 0.0045}, 0),
        (RELATIVE, {"arrival_s": 99.99}, 5),  # no prefill was seen: no objective is known
        # The slack of the step ends the run, whether an arrival could wait or not.
        (EAGER, {"until_s": 100.0035}, 3),
        (EAGER, {"until_s": 100.0005}, 0),
        (EAGER, {"until_s": 99.0}, 0),
        (SLACK, {"until_s": 100.0025, "arrival_s": 99.999}, 2),
        (SLACK, {"until_s": 101.0, "arrival_s": 99.5015}, 1),
    ],
)
def test_next_layers(policy, known, layers):
    assert policy.next_layers(view(**known)) == layers


@pytest.mark.parametrize(("layer_s", "sliced"), [(0.0002, True), (0.0001, False)])
def test_a_prefill_shorter_than_a_slice_runs_whole(layer_s, sliced):
    assert EAGER.worth_slicing(32, layer_s) is sliced


TIMES = st.floats(1e-6, 1.0)


@given(
    policy=st.sampled_from([EAGER, SLACK, RELATIVE]),
    layers_left=st.integers(1, 200),
    layer_s=TIMES,
    arrival_s=st.none() | st.floats(90.0, 100.0),
    online_s=TIMES,
    slack_s=TIMES | st.just(math.inf),
)
def test_a_slice_is_within_bounds_and_a_quiet_batch_moves(
    policy, layers_left, layer_s, arrival_s, online_s, slack_s
):
    layers = policy.next_layers(
        SliceView(
            now_s=100.0,
            layers_left=layers_left,
            layer_s=layer_s,
            arrival_s=arrival_s,
            online_s=online_s,
            until_s=100.0 + slack_s,
        )
    )
    assert 0 <= layers <= layers_left
    if layers > 1:
        assert layers * layer_s <= 0.005 * (1 + 1e-9)
    if arrival_s is None and slack_s == math.inf:
        assert layers >= 1


@given(
    yield_s=st.floats(5e-324, math.inf),
    mode=st.sampled_from(YieldMode),
    layers_left=st.integers(1, 200),
    layer_s=st.floats(5e-324, 1e308),
    until_s=st.floats(allow_nan=False),
    objective=st.floats(5e-324, 1e308).map(Seconds) | st.floats(1, 1e308).map(Factor),
)
def test_no_time_raises(yield_s, mode, layers_left, layer_s, until_s, objective):
    policy = Slicing(yield_s=yield_s, mode=mode, slo=Slo(objective, objective))
    for arrival_s in (None, 99.0):
        known = {"layers_left": layers_left, "layer_s": layer_s, "until_s": until_s}
        assert 0 <= policy.next_layers(view(arrival_s=arrival_s, **known)) <= layers_left
