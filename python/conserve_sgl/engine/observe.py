"""What the scheduler knows of its requests, summed up for a StepView."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice
from math import inf
from typing import TYPE_CHECKING

from conserve_sgl.policy import Prompt, Rows
from conserve_sgl.policy.slo import Pace, Slo

if TYPE_CHECKING:  # the tests of this file need no SGLang
    from conserve_sgl.engine.host import Req, ScheduleBatch

__all__ = ["OnlineClock", "RowCount", "rest_of_prompt", "waiting_prompts"]

_PROMPTS_SEEN = 32
"""Of a longer queue the rest is behind several steps of prefill already, whatever it holds."""


class OnlineClock:
    """When an online request arrived and got its first token; `time.monotonic` seconds."""

    __slots__ = ("arrived_s", "ended", "first_s")

    def __init__(self, arrived_s: float) -> None:
        self.arrived_s = arrived_s
        self.first_s: float | None = None
        self.ended = False

    def end(self, now_s: float, tokens: int) -> tuple[float, float | None] | None:
        """Time to first token and time per token after it, of a request that ends now with so many
        tokens; None the second time, and the latter None where there is but one token."""
        if self.ended:
            return None
        self.ended = True
        first_s = now_s if self.first_s is None else self.first_s
        tpot_s = (now_s - first_s) / (tokens - 1) if tokens > 1 else None
        return first_s - self.arrived_s, tpot_s


class RowCount:
    """Counts the rows of a step by class, and finds the earliest online deadlines; used once.

    Args:
        pace: when tokens are due.
        now_s: time of the step.
        is_offline: tells an offline request.
    """

    def __init__(self, pace: Pace, now_s: float, is_offline: Callable[[Req], bool]) -> None:
        self._pace = pace
        self._now_s = now_s
        self._is_offline = is_offline
        self._count = [0, 0]
        self._context = [0, 0]
        self.online_due_s = self.online_late_s = inf

    def add(self, reqs: Iterable[Req], in_flight: int) -> None:
        """Count `reqs`; each has `in_flight` tokens, 0 or 1, that were computed but not read."""
        for req in reqs:
            if req.finished():
                continue
            offline = self._is_offline(req)
            self._count[offline] += 1
            self._context[offline] += req.seqlen + in_flight
            if not offline:
                due_s, late_s = self._due_s(req, in_flight)
                self.online_due_s = min(self.online_due_s, due_s)
                self.online_late_s = min(self.online_late_s, late_s)

    def _due_s(self, req: Req, in_flight: int) -> tuple[float, float]:
        clock, tokens = req.online_clock, len(req.output_ids)
        if clock.first_s is None:
            if tokens == 0:  # its first token is in flight
                return self._pace.next_due_s(self._now_s, 1)
            clock.first_s = self._now_s
        return self._pace.next_due_s(clock.first_s, tokens + in_flight)

    @property
    def online(self) -> Rows:
        return Rows(self._count[0], self._context[0])

    @property
    def offline(self) -> Rows:
        return Rows(self._count[1], self._context[1])


def running_rows(
    count: RowCount,
    running: ScheduleBatch,
    last: ScheduleBatch | None,
    chunk: Req | None,
    *,
    overlap: bool,
) -> None:
    """Count the rows that can decode in the step that comes.

    SGLang merges a finished prefill into the running batch right after this; with overlap
    scheduling every row of the last batch has a token that was not read yet.
    """
    if last is not None and last.forward_mode.is_extend():
        count.add(running.reqs, 0)
        count.add((req for req in last.reqs if req is not chunk), int(overlap))
    else:
        count.add(running.reqs, int(overlap and last is not None))


def rest_of_prompt(req: Req, deadline_s: float = inf) -> Prompt:
    """What is left of a prompt between two of its chunks."""
    done = max(req.extend_end, req.prefix_len)
    return Prompt(max(req.seqlen - done, 1), done, deadline_s)


def waiting_prompts(slo: Slo, chunk: Req | None, waiting: Iterable[Req]) -> tuple[Prompt, ...]:
    """Online prompts in the order in which they run, the one that is being chunked first."""
    first = (
        ()
        if chunk is None
        else (rest_of_prompt(chunk, slo.first_due_s(chunk.online_clock.arrived_s)),)
    )
    rest = (
        Prompt(req.seqlen, 0, slo.first_due_s(req.online_clock.arrived_s))
        for req in islice(waiting, _PROMPTS_SEEN)
    )
    return tuple(chain(first, rest))
