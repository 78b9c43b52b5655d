"""How often, and how much of, the running offline requests is checkpointed in a step.

A checkpoint costs host time, for which a GPU may have to wait, and, with HiCache, a copy to host
memory. What it saves is recomputation when the request gives way. So its stride is the one that
costs least: long where a token is computed in microseconds and requests hardly ever give way, short
where a token takes milliseconds, requests give way all the time, or memory runs short. None is made
in a step that online requests wait for or while the copy engine is behind, unless memory is about
to run out. Nor are there any copies while they would take more than they are likely to save.
"""

from __future__ import annotations

from math import sqrt

import msgspec

__all__ = [
    "CheckpointPlan",
    "CheckpointView",
    "Risk",
    "copies_pay",
    "plan_checkpoints",
    "stride_that_pays",
]

_CHECKPOINT_S = 0.6e-3
"""Host seconds of a checkpoint: 0.4 to 0.7 ms on servers with and without a GPU
(docs/kv-checkpoints.md)."""

_COPY_BYTES_PER_S = 17e9
"""At which copies to the host take the device's time: one of 128 KB held up the step after it by
7.5 us on an H100 (docs/kv-checkpoints.md)."""

_LIFE_TOKENS = 512
"""By which a request may grow, and give way, after its KV was copied."""

_SHORT_FREE = 0.1  # share of the KV pool that is free, or can be made free at once
_SHORT_STRIDE = 8  # the stride then shrinks to its eighth, never below a page
_BACKLOG_SHARE = 1 / 16  # of the KV pool may wait for the copy engine
_TOKENS_PER_STEP_STRIDES = 8  # a step checkpoints at most this many strides
_STEP_STRIDE = 128  # of so many tokens where they are shorter, so that all rows get their turn


class CheckpointView(msgspec.Struct, frozen=True, kw_only=True):
    """What decides about checkpoints. All counts are KV tokens.

    Args:
        stride_tokens: the longest stride, as configured.
        token_s: seconds that computing a token again takes.
        risk: that a request gives way before it has grown by a token, 0 to 1.
        page_tokens: KV page of the engine; checkpoints end on page boundaries.
        free_kv_tokens: free, or evictable from the radix tree.
        total_kv_tokens: size of the device pool.
        backlog_tokens: queued for the copy to the host, or being copied; 0 without a host cache.
        online_tight: an online request waits for this step or the next.
    """

    stride_tokens: int
    token_s: float
    risk: float
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
    stride = _stride(view, short=short)
    behind = view.backlog_tokens > view.total_kv_tokens * _BACKLOG_SHARE
    if behind or (view.online_tight and not short):
        return CheckpointPlan(stride_tokens=stride, budget_tokens=0)
    budget = max(stride, min(view.stride_tokens, _STEP_STRIDE)) * _TOKENS_PER_STEP_STRIDES
    return CheckpointPlan(stride_tokens=stride, budget_tokens=budget)


def _stride(view: CheckpointView, *, short: bool) -> int:
    pays = stride_that_pays(view.stride_tokens, token_s=view.token_s, risk=view.risk)
    return max(round(pays / (_SHORT_STRIDE if short else 1)), view.page_tokens)


def stride_that_pays(longest: int, *, token_s: float, risk: float) -> float:
    """The stride n, up to the `longest`, that costs least: a checkpoint in n tokens, and half of n
    computed again, on average, where a request gives way. That is c / n + risk * token_s * n / 2
    for each token."""
    lost_s = risk * token_s
    return min(sqrt(2 * _CHECKPOINT_S / lost_s), longest) if lost_s > 0 else longest


def copies_pay(*, token_s: float, risk: float, token_bytes: float) -> bool:
    """Whether to copy the KV of a token to the host is likely to save more than it takes.

    Args:
        token_s: seconds that computing the token again takes.
        risk: that a request gives way before it has grown by a token.
        token_bytes: of KV in all layers.
    """
    return min(risk * _LIFE_TOKENS, 1.0) * token_s >= token_bytes / _COPY_BYTES_PER_S


class Risk:
    """How often requests gave way lately, for each token by which they grew.

    Counted in tokens, not in time: ranks that run the same steps know the same.
    """

    _KEPT_TOKENS = 1 << 16
    _FIRST = (1.0, 4096.0)  # as if one had given way so long ago, before anything is known

    def __init__(self) -> None:
        self._times, self._tokens = self._FIRST

    def grew(self, tokens: int) -> None:
        """Requests grew by so many tokens together."""
        self._tokens += tokens
        if self._tokens > self._KEPT_TOKENS:
            self._tokens /= 2
            self._times /= 2

    def gave_way(self) -> None:
        """A request gave way."""
        self._times += 1

    @property
    def per_token(self) -> float:
        """The risk of one token, 0 to 1."""
        return min(self._times / self._tokens, 1.0)
