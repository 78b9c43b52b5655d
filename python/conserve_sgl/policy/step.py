"""The boundary between deciding and acting: a frozen StepView in, a frozen StepPlan out.

The engine observes, the policy plans, the engine applies. A policy never sees a request object
and never touches the engine; replacing a policy replaces nothing else.
"""

from __future__ import annotations

from math import inf
from typing import Protocol

import msgspec

from conserve_sgl.policy.bound import Bound
from conserve_sgl.policy.slo import Pace

__all__ = ["Policy", "Prompt", "Rows", "StepPlan", "StepView"]


class Prompt(msgspec.Struct, frozen=True, array_like=True):
    """A prompt, or the rest of one, that is yet to be computed.

    Args:
        new_tokens: to compute; a cached prefix is not known before admission and counts as new.
        resident_tokens: of it that are in the KV pool already.
        deadline_s: when its first token is due, on the view's clock; infinite for offline work.
    """

    new_tokens: int
    resident_tokens: int = 0
    deadline_s: float = inf


class Rows(msgspec.Struct, frozen=True, array_like=True):
    """Some rows that decode, or could: how many, and the sum of their contexts in tokens."""

    count: int = 0
    context_tokens: int = 0

    @property
    def mean_context_tokens(self) -> int:
        """Of a row; 0 without rows."""
        return self.context_tokens // self.count if self.count else 0


NO_ROWS = Rows()


class StepView(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy knows when it plans a step. Counts are requests unless the name says tokens.

    Args:
        now_s: a monotonic clock, in seconds.
        free_at_s: when the device is expected to finish what it runs now; `now_s` when idle.
        online_arriving: announced by the arrival channel, still being tokenized.
        online_prompts: online prompts in the order in which they will run; the one between two
            of its chunks first. Long queues may be cut: what is left out is behind all of these.
        online_decoding: online rows of the running batch.
        online_due_s: when the first of their next tokens is due in a step with offline work in it,
            by the policy's own pace; infinite without rows.
        online_late_s: the same with the reserve spent that the pace keeps; never earlier.
        offline_waiting: in the OfflineQueue.
        offline_chunk: the offline prompt between two of its chunks, or None.
        offline_decoding: offline rows of the running batch.
        offline_parked: offline rows that sit out and keep their KV.
        offline_suspended: requests of an offline prefill that is suspended between two layers;
            while there are any, no other offline prefill may start.
        free_rows: request rows of the engine that nobody holds.
        max_rows: request rows that offline work may hold at most.
        free_kv_tokens: KV tokens that are free or can be evicted from the radix cache.
        total_kv_tokens: size of the device KV pool.
        chunk_tokens: the engine's own limit on the prefill tokens of a step.
        rows_decoded: whether the running rows got a token in the last step; True when none ran.
        can_mix: whether prompt tokens may ride in the step in which the running rows decode.
        step_tokens: tokens that a decode step gives a row, in the mean of late; more than one with
            speculative decoding.
        interruptible: whether an offline prefill yields within the step (layer slices).
    """

    now_s: float
    free_at_s: float = 0.0
    online_arriving: int = 0
    online_prompts: tuple[Prompt, ...] = ()
    online_decoding: Rows = NO_ROWS
    online_due_s: float = inf
    online_late_s: float = inf
    offline_waiting: int = 0
    offline_chunk: Prompt | None = None
    offline_decoding: Rows = NO_ROWS
    offline_parked: Rows = NO_ROWS
    offline_suspended: int = 0
    free_rows: int = 0
    max_rows: int = 0
    free_kv_tokens: int = 0
    total_kv_tokens: int = 0
    chunk_tokens: int = 0
    rows_decoded: bool = True
    can_mix: bool = False
    step_tokens: float = 1.0
    interruptible: bool = False

    @property
    def online_present(self) -> bool:
        """Whether any online request is anywhere in the engine or on its way to it."""
        return bool(self.online_arriving or self.online_prompts or self.online_decoding.count)

    @property
    def offline_resident(self) -> int:
        """Offline requests that hold a row."""
        chunk = self.offline_chunk is not None
        aside = self.offline_parked.count + self.offline_suspended
        return chunk + self.offline_decoding.count + aside


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What may run in the step.

    Args:
        offline_prefill_tokens: prompt tokens that offline requests may compute.
        offline_admissions: requests that may leave the OfflineQueue.
        offline_decode_rows: offline rows that may decode; the rest sit out.
        offline_slice_s: seconds that layer slices of an offline prefill may run in a step of their
            own before what decodes goes on; 0 keeps a suspended one where it is.
        mix: whether the offline prompts and the rows that decode share the step.
        in_slices: whether an offline prefill of the step may be cut into slices of layers, to make
            way for an arrival; it then runs outside of graphs and without overlap.
        kv_reserve_tokens: KV tokens that an offline admission must leave free for online.
        bound_s: predicted seconds that the step was sized to stay within; infinite when no rule
            bound it. For metrics and tests.
        bound: what bounds offline work in it, for people.
    """

    offline_prefill_tokens: int
    offline_admissions: int
    offline_decode_rows: int
    kv_reserve_tokens: int
    offline_slice_s: float = inf
    mix: bool = False
    in_slices: bool = False
    bound_s: float = inf
    bound: Bound = Bound.YIELD

    def __post_init__(self) -> None:
        if min(self.offline_prefill_tokens, self.offline_admissions) < 0:
            raise ValueError(f"a plan grants no negative work: {self}")
        if min(self.offline_decode_rows, self.kv_reserve_tokens) < 0:
            raise ValueError(f"a plan holds no negative rows or tokens: {self}")


class Policy(Protocol):
    """Plans steps. May keep state of its own between steps; must not block.

    `pace` says when the tokens of online rows are due, from one plan to the next.
    """

    pace: Pace

    def plan(self, view: StepView) -> StepPlan:
        """Decide what may run in the step that `view` describes."""
        ...

    def online_ended(self, *, ttft_s: float, tpot_s: float | None) -> None:
        """An online request ended, and got this; `tpot_s` is None for an answer of one token."""
        ...
