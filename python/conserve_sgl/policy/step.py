"""The boundary between deciding and acting: a frozen StepView in, a frozen StepPlan out.

The engine observes, the policy plans, the engine applies. A policy never sees a request object
and never touches the engine; replacing a policy replaces nothing else.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

__all__ = ["Policy", "StepPlan", "StepView"]


class StepView(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy knows when it plans a step. Counts are requests unless the name says tokens.

    Args:
        now_s: a monotonic clock, in seconds.
        online_arriving: announced by the arrival channel, still being tokenized.
        online_waiting: in SGLang's waiting queue.
        online_waiting_tokens: their prompt tokens, cached prefixes not subtracted.
        online_prefilling: 1 while an online prompt is between two of its chunks, else 0.
        online_decoding: online rows of the running batch.
        offline_waiting: in the OfflineQueue.
        offline_prefilling: 1 while an offline prompt is between two of its chunks, else 0.
        offline_decoding: offline rows of the running batch.
        offline_parked: offline rows that sit out and keep their KV.
        free_rows: request rows of the engine that nobody holds.
        free_kv_tokens: KV tokens that are free or can be evicted from the radix cache.
        total_kv_tokens: size of the device KV pool.
        chunk_tokens: the engine's own limit on the prefill tokens of a step.
        rows_decoded: whether the running rows got a token in the last step; True when none ran.
    """

    now_s: float
    online_arriving: int = 0
    online_waiting: int = 0
    online_waiting_tokens: int = 0
    online_prefilling: int = 0
    online_decoding: int = 0
    offline_waiting: int = 0
    offline_prefilling: int = 0
    offline_decoding: int = 0
    offline_parked: int = 0
    free_rows: int = 0
    free_kv_tokens: int = 0
    total_kv_tokens: int = 0
    chunk_tokens: int = 0
    rows_decoded: bool = True

    @property
    def online_present(self) -> bool:
        """Whether any online request is anywhere in the engine or on its way to it."""
        return bool(
            self.online_arriving
            or self.online_waiting
            or self.online_prefilling
            or self.online_decoding
        )

    @property
    def offline_resident(self) -> int:
        """Offline requests that hold a row."""
        return self.offline_prefilling + self.offline_decoding + self.offline_parked


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the offline class may use in the step; online work is never limited by it.

    Args:
        offline_prefill_tokens: prompt tokens that offline requests may compute.
        offline_admissions: requests that may leave the OfflineQueue.
        offline_decode_rows: offline rows that may decode; the rest sit out.
        kv_reserve_tokens: KV tokens that an offline admission must leave free for online.
    """

    offline_prefill_tokens: int
    offline_admissions: int
    offline_decode_rows: int
    kv_reserve_tokens: int

    def __post_init__(self) -> None:
        if min(self.offline_prefill_tokens, self.offline_admissions) < 0:
            raise ValueError(f"a plan grants no negative work: {self}")
        if min(self.offline_decode_rows, self.kv_reserve_tokens) < 0:
            raise ValueError(f"a plan holds no negative rows or tokens: {self}")


class Policy(Protocol):
    """Plans steps. May keep state of its own between steps; must not block."""

    def plan(self, view: StepView) -> StepPlan:
        """Decide what offline work may use in the step that `view` describes."""
        ...
