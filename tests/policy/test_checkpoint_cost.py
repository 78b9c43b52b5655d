"""How often and how much is checkpointed: tables of views and plans."""

from __future__ import annotations

import pytest

from conserve_sgl.policy.checkpoint_cost import CheckpointView, Risk, plan_checkpoints

TOTAL = 10_000
SELDOM, OFTEN = 1 / 4096, 1 / 64  # a request gives way once in so many tokens
GPU_S, CPU_S = 25e-6, 2e-3  # to compute a token again


def view(**changes) -> CheckpointView:
    return CheckpointView(
        **{
            "stride_tokens": 128,
            "token_s": GPU_S,
            "risk": SELDOM,
            "page_tokens": 1,
            "free_kv_tokens": TOTAL,
            "total_kv_tokens": TOTAL,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("token_s", "risk", "stride"),
    [
        pytest.param(GPU_S, SELDOM, 443, id="a fast device, hardly ever"),
        pytest.param(GPU_S, OFTEN, 55, id="a fast device, all the time"),
        pytest.param(CPU_S, SELDOM, 50, id="a slow device, hardly ever"),
        pytest.param(CPU_S, OFTEN, 6, id="a slow device, all the time"),
        pytest.param(0.0, OFTEN, 1024, id="to compute again costs nothing"),
        pytest.param(GPU_S, 0.0, 1024, id="nothing gives way"),
    ],
)
def test_the_stride_is_the_one_that_costs_least(token_s, risk, stride):
    asked = view(stride_tokens=1024, token_s=token_s, risk=risk)
    assert plan_checkpoints(asked).stride_tokens == stride


@pytest.mark.parametrize("risk", [SELDOM, OFTEN])
def test_no_other_stride_would_cost_less(risk):
    def cost_s(stride: int) -> float:  # of a token: a checkpoint's share, and half a stride lost
        return 0.6e-3 / stride + risk * CPU_S * stride / 2

    asked = view(stride_tokens=1024, token_s=CPU_S, risk=risk)
    assert plan_checkpoints(asked).stride_tokens == min(range(1, 1025), key=cost_s)


@pytest.mark.parametrize(
    ("free", "stride"),
    [
        pytest.param(10_000, 128, id="an empty pool"),
        pytest.param(1_001, 128, id="not yet short"),
        pytest.param(1_000, 16, id="short"),
        pytest.param(0, 16, id="full"),
    ],
)
def test_the_stride_is_never_above_what_is_configured_and_an_eighth_where_memory_is_short(
    free, stride
):
    assert plan_checkpoints(view(free_kv_tokens=free)).stride_tokens == stride


def test_the_stride_is_never_below_a_page():
    assert plan_checkpoints(view(free_kv_tokens=0, page_tokens=64)).stride_tokens == 64
    assert plan_checkpoints(view(stride_tokens=1)).stride_tokens == 1


def test_the_risk_follows_what_happens_and_forgets_it():
    risk = Risk()
    assert risk.per_token == 1 / 4096  # nothing is known yet
    risk.grew(4096)
    assert risk.per_token == 1 / 8192
    for _ in range(40):
        risk.gave_way()
    often = risk.per_token
    assert often == 41 / 8192
    for _ in range(1000):
        risk.grew(1000)
    assert risk.per_token < often / 100


def test_the_risk_is_at_most_one():
    risk = Risk()
    for _ in range(5000):
        risk.gave_way()
    assert risk.per_token == 1.0


@pytest.mark.parametrize(
    ("changes", "writes"),
    [
        pytest.param({}, True, id="nothing presses"),
        pytest.param({"online_tight": True}, False, id="online waits"),
        pytest.param(
            {"online_tight": True, "free_kv_tokens": 1_000}, True, id="online waits, memory short"
        ),
        pytest.param({"backlog_tokens": 625}, True, id="the copy engine keeps up"),
        pytest.param({"backlog_tokens": 626}, False, id="the copy engine is behind"),
        pytest.param(
            {"backlog_tokens": 626, "free_kv_tokens": 0}, False, id="behind, and memory short"
        ),
    ],
)
def test_what_holds_checkpoints_back(changes, writes):
    assert (plan_checkpoints(view(**changes)).budget_tokens > 0) is writes


def test_a_step_writes_a_few_strides_at_most():
    assert plan_checkpoints(view()).budget_tokens == 8 * 128
    long = plan_checkpoints(view(stride_tokens=1024))
    assert long.budget_tokens == 8 * long.stride_tokens
    short = plan_checkpoints(view(stride_tokens=1024, token_s=CPU_S, risk=OFTEN))
    assert (short.stride_tokens, short.budget_tokens) == (6, 8 * 128)


def test_a_pool_of_no_size_divides_nothing_by_zero():
    plan = plan_checkpoints(view(free_kv_tokens=0, total_kv_tokens=0))
    assert plan.stride_tokens == 16
