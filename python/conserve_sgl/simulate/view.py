"""The StepView of the simulated scheduler: the one place that knows how a policy sees its state.

As `engine/observe.py` does for the real one; the two change together.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import TYPE_CHECKING

from conserve_sgl.policy import Prompt, Rows, Slo, StepView, most_offline_rows
from conserve_sgl.policy.slo import Pace
from conserve_sgl.simulate.request import Request

if TYPE_CHECKING:
    from conserve_sgl.simulate.conserve import ConserveScheduler

__all__ = ["observe"]

_PROMPTS_SEEN = 32


def observe(scheduler: ConserveScheduler, now_s: float) -> StepView:
    """What `scheduler` knows at `now_s`, when it plans the next step."""
    online = [row for row in scheduler.running if row.online]
    offline = [row for row in scheduler.running if not row.online]
    pace = scheduler.policy.pace
    dues = [_next_due_s(pace, row, now_s) for row in online]
    limits = scheduler.limits
    chunk = scheduler.chunk
    online_chunk = chunk if chunk is not None and chunk.online else None
    offline_chunk = scheduler.aside_chunk if chunk is None or chunk.online else chunk
    return StepView(
        now_s=now_s,
        free_at_s=scheduler.free_at_s(now_s),
        online_arriving=len(scheduler.arriving),
        online_prompts=_prompts(scheduler.slo, online_chunk, scheduler.waiting),
        online_decoding=_rows(online),
        online_due_s=min((due_s for due_s, _ in dues), default=inf),
        online_late_s=min((late_s for _, late_s in dues), default=inf),
        offline_waiting=len(scheduler.queue),
        offline_chunk=None if offline_chunk is None else _rest(offline_chunk),
        offline_decoding=_rows(offline),
        offline_parked=_rows(scheduler.parked),
        offline_suspended=scheduler.suspended_requests,
        free_rows=limits.rows - scheduler.rows_held,
        max_rows=most_offline_rows(limits.rows),
        free_kv_tokens=scheduler.pool.free_tokens,
        total_kv_tokens=limits.kv_tokens,
        chunk_tokens=limits.chunk_tokens,
        rows_decoded=scheduler.rows_decoded,
        can_mix=scheduler.can_mix,
        interruptible=scheduler.slices_enabled,
    )


def _rows(requests: list[Request]) -> Rows:
    return Rows(len(requests), sum([r.prompt_tokens + r.launched for r in requests]))


def _next_due_s(pace: Pace, row: Request, now_s: float) -> tuple[float, float]:
    if not row.token_times_s:  # its first token is in flight
        return pace.next_due_s(now_s, 1)
    return pace.next_due_s(row.first_s, row.launched)


def _rest(request: Request, deadline_s: float = inf) -> Prompt:
    left = max(request.fill_tokens - request.resident, 1)
    return Prompt(left, request.resident, deadline_s)


def _prompts(slo: Slo, chunk: Request | None, waiting: Iterable[Request]) -> tuple[Prompt, ...]:
    first = () if chunk is None else (_rest(chunk, slo.first_due_s(chunk.due_s)),)
    rest = [Prompt(r.fill_tokens, 0, slo.first_due_s(r.due_s)) for r in waiting]
    return (*first, *rest[:_PROMPTS_SEEN])
