"""How often and how much is checkpointed: tables of views and plans."""

from __future__ import annotations

import pytest

from conserve_sgl.policy.checkpointing import CheckpointView, plan_checkpoints

TOTAL = 10_000


def view(**changes) -> CheckpointView:
    return CheckpointView(
        **{
            "stride_tokens": 128,
            "page_tokens": 1,
            "free_kv_tokens": TOTAL,
            "total_kv_tokens": TOTAL,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("free", "stride"),
    [
        pytest.param(10_000, 128, id="an empty pool"),
        pytest.param(5_000, 128, id="half of it"),
        pytest.param(3_000, 64, id="half way to short"),
        pytest.param(2_000, 32, id="a quarter of the way"),
        pytest.param(1_000, 16, id="short"),
        pytest.param(0, 16, id="full"),
    ],
)
def test_the_stride_shrinks_with_the_memory_that_is_left(free, stride):
    assert plan_checkpoints(view(free_kv_tokens=free)).stride_tokens == stride


def test_the_stride_is_never_below_a_page():
    assert plan_checkpoints(view(free_kv_tokens=0, page_tokens=64)).stride_tokens == 64
    assert plan_checkpoints(view(stride_tokens=1)).stride_tokens == 1


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


def test_a_pool_of_no_size_divides_nothing_by_zero():
    plan = plan_checkpoints(view(free_kv_tokens=0, total_kv_tokens=0))
    assert plan.stride_tokens == 16
