"""The first budget: offline work takes what a fixed cap of tokens a step leaves.

A step computes at most `step_tokens` prompt and decode tokens as far as offline work is
concerned: what online prompts and rows use of it is gone, the rest is offline's. The cap bounds
how long a step can be made by offline work, and with it how long an arrival waits. It knows
nothing of time; the latency model replaces it.
"""

from __future__ import annotations

from conserve_sgl.policy.step import StepPlan, StepView

__all__ = ["FixedCap"]


class FixedCap:
    """A fixed cap of tokens a step, of offline rows in the engine, and of rows beside online.

    Args:
        step_tokens: tokens of a step, online's included.
        resident_rows: offline requests that may hold a row at a time.
        rows_beside_online: offline rows that may decode while an online request is present.
        kv_reserve: share of the KV pool, 0 to 1, that admitting offline work leaves free.
    """

    def __init__(
        self, *, step_tokens: int, resident_rows: int, rows_beside_online: int, kv_reserve: float
    ) -> None:
        self._step_tokens = step_tokens
        self._resident_rows = resident_rows
        self._rows_beside_online = rows_beside_online
        self._kv_reserve = kv_reserve

    def plan(self, view: StepView) -> StepPlan:
        """See `Policy.plan`."""
        tokens = self._prefill_tokens(view)
        room = min(self._resident_rows - view.offline_resident, view.free_rows)
        return StepPlan(
            offline_prefill_tokens=tokens,
            offline_admissions=max(min(room, view.offline_waiting), 0) if tokens else 0,
            offline_decode_rows=(
                self._rows_beside_online if view.online_present else self._resident_rows
            ),
            kv_reserve_tokens=self._reserve_tokens(view),
        )

    def _prefill_tokens(self, view: StepView) -> int:
        # Starting a prefill now would make the arrival wait for it.
        if view.online_arriving:
            return 0
        # Every online token is followed by at most one offline prefill, never by a run of them.
        if view.online_decoding and not view.rows_decoded:
            return 0
        online_tokens = view.online_waiting_tokens + view.online_decoding
        if view.online_prefilling:
            online_tokens += view.chunk_tokens
        return max(min(self._step_tokens, view.chunk_tokens) - online_tokens, 0)

    def _reserve_tokens(self, view: StepView) -> int:
        # On an empty engine a request larger than what the reserve leaves may run: it would
        # otherwise wait for ever, and nobody is there to be served by the reserve.
        if not view.online_present and not view.offline_resident:
            return 0
        return int(self._kv_reserve * view.total_kv_tokens)
