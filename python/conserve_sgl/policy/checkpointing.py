"""How often, and how much of, the running offline requests is checkpointed in a step.

A checkpoint costs a little host time and, with HiCache, a copy to host memory. What it saves is
recomputation when the request gives way. So it is made rarely while memory is plentiful, often
while memory runs short, and not at all in a step that online requests wait for or while the copy
engine is behind, unless memory is about to run out.
"""

from __future__ import annotations

import msgspec

__all__ = ["CheckpointPlan", "CheckpointView", "plan_checkpoints"]

# Shares of the KV pool that are free, or can be made free at once.
_PLENTY_FREE = 0.5
_SHORT_FREE = 0.1
_SHORTEST_STRIDE = 8  # the stride shrinks to its eighth, never below a page
_BACKLOG_SHARE = 1 / 16  # of the KV pool may wait for the copy engine
_TOKENS_PER_STEP_STRIDES = 8  # a step checkpoints at most this many strides


class CheckpointView(msgspec.Struct, frozen=True, kw_only=True):
    """What decides about checkpoints. All counts are KV tokens.

    Args:
        stride_tokens: the configured stride.
        page_tokens: KV page of the engine; checkpoints end on page boundaries.
        free_kv_tokens: free, or evictable from the radix tree.
        total_kv_tokens: size of the device pool.
        backlog_tokens: queued for the copy to the host, or being copied; 0 without a host cache.
        online_tight: an online request waits for this step or the next.
    """

    stride_tokens: int
    page_tokens: int
    free_kv_tokens: int
    total_kv_tokens: int
    backlog_tokens: int = 0
    online_tight: bool = False


class CheckpointPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests are due, and how much may be written in the step.

    Args:
        stride_tokens: a request is due once it has this many tokens that no checkpoint holds.
        budget_tokens: tokens that may be checkpointed in the step; 0 for none.
    """

    stride_tokens: int
    budget_tokens: int


def plan_checkpoints(view: CheckpointView) -> CheckpointPlan:
    """The stride and the budget of this step."""
    free = view.free_kv_tokens / max(view.total_kv_tokens, 1)
    short = free <= _SHORT_FREE
    stride = _stride(view, free)
    behind = view.backlog_tokens > view.total_kv_tokens * _BACKLOG_SHARE
    if behind or (view.online_tight and not short):
        return CheckpointPlan(stride_tokens=stride, budget_tokens=0)
    budget = max(stride, view.stride_tokens) * _TOKENS_PER_STEP_STRIDES
    return CheckpointPlan(stride_tokens=stride, budget_tokens=budget)


def _stride(view: CheckpointView, free: float) -> int:
    """The configured stride down to its eighth, in proportion to the memory that is left."""
    share = (free - _SHORT_FREE) / (_PLENTY_FREE - _SHORT_FREE)
    share = min(max(share, 1 / _SHORTEST_STRIDE), 1.0)
    return max(round(view.stride_tokens * share), view.page_tokens)
