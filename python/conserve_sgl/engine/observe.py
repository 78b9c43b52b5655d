"""What the scheduler knows of its requests, summed up for a StepView."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from conserve_sgl.engine.ledger import is_aborted
from conserve_sgl.engine.offline_item import answer_tokens
from conserve_sgl.policy import Policy, Prompt, Rows, StepView, most_offline_rows
from conserve_sgl.policy.slo import Pace, Slo

if TYPE_CHECKING:  # the tests of this file need no SGLang
    from conserve_sgl.engine.aside import Aside
    from conserve_sgl.engine.host import Req, ScheduleBatch
    from conserve_sgl.engine.intake import Intake
    from conserve_sgl.engine.learning import Learning
    from conserve_sgl.engine.live_settings import LiveSettings
    from conserve_sgl.engine.memory import KvMemory
    from conserve_sgl.status.latency import OnlineLatencies

__all__ = ["Observer", "OnlineClock", "RowCount", "rest_of_prompt", "waiting_prompts"]

_PROMPTS_SEEN = 32
"""Of a longer queue the rest is behind several steps of prefill already, whatever it holds."""

_ACCEPTED = 0.05
"""Weight of the newest step in the mean of what a step gives."""


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
        self._context = [0.0, 0.0]
        self.online_due_s = self.online_late_s = inf

    def add(self, reqs: Iterable[Req], in_flight: float) -> None:
        """Count `reqs`; each has `in_flight` tokens that were computed but not read: 0, 1, or what
        a step of speculative decoding gives in the mean."""
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

    def _due_s(self, req: Req, in_flight: float) -> tuple[float, float]:
        clock, tokens = req.online_clock, len(req.output_ids)
        if clock.first_s is None:
            if tokens == 0:  # its first token is in flight
                return self._pace.next_due_s(self._now_s, 1)
            clock.first_s = self._now_s
        return self._pace.next_due_s(clock.first_s, tokens + in_flight)

    @property
    def online(self) -> Rows:
        return Rows(self._count[0], round(self._context[0]))

    @property
    def offline(self) -> Rows:
        return Rows(self._count[1], round(self._context[1]))


class AcceptedLength:
    """Tokens that a decode step gives a row: 1, and more with speculative decoding.

    Attributes:
        tokens: a moving average of late, over the online rows where there are any.
    """

    def __init__(self, is_offline: Callable[[Req], bool]) -> None:
        self._is_offline = is_offline
        self.tokens = 1.0
        self._measured = False

    def note(self, reqs: Sequence[Req], drafts: Sequence[int]) -> None:
        """A step gave each of `reqs` one token, and so many that were drafted."""
        online = [n for req, n in zip(reqs, drafts, strict=True) if not self._is_offline(req)]
        counted = online or drafts
        if not counted:
            return
        now = 1 + sum(counted) / len(counted)
        weight = _ACCEPTED if self._measured else 1.0
        self.tokens += weight * (now - self.tokens)
        self._measured = True


def running_rows(
    count: RowCount,
    running: ScheduleBatch,
    last: ScheduleBatch | None,
    chunk: Req | None,
    *,
    overlap: bool,
    step_tokens: float = 1.0,
) -> None:
    """Count the rows that can decode in the step that comes.

    SGLang merges a finished prefill into the running batch right after this; with overlap
    scheduling every row of the last batch has tokens that were not read yet: one of a prefill,
    `step_tokens` of a decode step.
    """
    if last is not None and last.forward_mode.is_extend():
        count.add(running.reqs, 0)
        count.add((req for req in last.reqs if req is not chunk), int(overlap))
    else:
        count.add(running.reqs, step_tokens if overlap and last is not None else 0)


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


class _Host(Protocol):
    """What of SGLang's scheduler is looked at."""

    chunked_req: Req | None
    waiting_queue: list[Req]
    enable_overlap: bool
    chunked_prefill_size: int
    max_running_requests: int
    max_total_num_tokens: int
    spec_algorithm: Any


class Observer:
    """Looks at the engine for the policy, before each step, and tells it how requests ended.

    Args:
        host: SGLang's scheduler.
        policy: whose pace says when tokens are due.
        live: the settings of now.
        intake: what is announced, and what waits.
        aside: what SGLang does not know of.
        memory: the KV pool.
        learning: knows when the device will be free.
        is_offline: tells an offline request.
        is_probe: tells a health check of SGLang's from requests of clients.
        latencies: what online requests get, or None.

    Attributes:
        view: what was seen last.
    """

    def __init__(
        self,
        host: _Host,
        *,
        policy: Policy,
        live: LiveSettings,
        intake: Intake,
        aside: Aside,
        memory: KvMemory,
        learning: Learning,
        is_offline: Callable[[Req], bool],
        is_probe: Callable[[Req], bool],
        latencies: OnlineLatencies | None,
    ) -> None:
        self._is_probe = is_probe
        self._latencies = latencies
        self.view = StepView(now_s=time.monotonic())
        self._host = host
        self._policy = policy
        self._live = live
        self._intake = intake
        self._aside = aside
        self._memory = memory
        self._learning = learning
        self._is_offline = is_offline
        self._rows_decoded = True
        self._accepted = AcceptedLength(is_offline)

    def look(self, running: ScheduleBatch, last: ScheduleBatch | None) -> StepView:
        """What there is before SGLang forms a step from `running` and the batch that ran last."""
        now_s = time.monotonic()
        host, aside = self._host, self._aside
        count = RowCount(self._policy.pace, now_s, self._is_offline)
        running_rows(
            count,
            running,
            last,
            host.chunked_req,
            overlap=host.enable_overlap,
            step_tokens=self._accepted.tokens,
        )
        online_chunk, offline_chunk = self._chunks()
        offline_waiting = len(self._intake.queue)
        if self._live.now.holds_offline:
            offline_chunk, offline_waiting = None, 0
        parked = aside.parked.reqs
        self.view = StepView(
            now_s=now_s,
            free_at_s=self._learning.busy_until_s(),
            online_arriving=self._intake.arriving,
            online_prompts=waiting_prompts(self._live.slo, online_chunk, host.waiting_queue),
            online_decoding=count.online,
            online_due_s=count.online_due_s,
            online_late_s=count.online_late_s,
            offline_waiting=offline_waiting,
            offline_chunk=None if offline_chunk is None else rest_of_prompt(offline_chunk),
            offline_decoding=count.offline,
            offline_parked=Rows(len(parked), sum(req.seqlen for req in parked)),
            offline_suspended=len(aside.slices.suspended_reqs),
            free_rows=self._memory.free_rows,
            max_rows=most_offline_rows(host.max_running_requests),
            free_kv_tokens=self._memory.free_tokens,
            total_kv_tokens=host.max_total_num_tokens,
            chunk_tokens=host.chunked_prefill_size,
            rows_decoded=self._rows_decoded,
            # Beside a prompt a row would get one token, whatever was drafted for it.
            can_mix=host.spec_algorithm.is_none() and not running.return_logprob,
            step_tokens=self._accepted.tokens,
            interruptible=aside.slices.enabled,
        )
        return self.view

    def _chunks(self) -> tuple[Req | None, Req | None]:
        """The prompts between two of their chunks, the online one and the offline one."""
        chunk = self._host.chunked_req
        if chunk is not None and self._is_offline(chunk):
            return None, chunk
        return chunk, self._aside.chunk

    def note_formed(self, batch: ScheduleBatch | None) -> None:
        """SGLang formed this step, or (None) there is nothing to run."""
        mode = None if batch is None else batch.forward_mode
        self._rows_decoded = mode is None or mode.is_mixed() or not mode.is_extend()

    def note_result(self, batch: ScheduleBatch, drafts: Sequence[int] | None = None) -> None:
        """The result of `batch` was handled: tell the policy what online requests got that end.

        Args:
            batch: that ran.
            drafts: of each row, the drafted tokens that were accepted; None where none were.
        """
        if drafts is not None:
            self._accepted.note(batch.reqs, drafts)
        now_s, seen = time.monotonic(), self._latencies
        decoded, first = 0, []
        for req in batch.reqs:
            if self._is_offline(req):
                continue
            if seen is not None and self._counts(req):
                if req.online_clock.first_s is None:
                    req.online_clock.first_s = now_s
                    first.append(req)
                else:
                    decoded += 1
            if not req.finished() or is_aborted(req):
                continue
            got = req.online_clock.end(now_s, answer_tokens(req))
            if got is not None:  # a request that ended may be in the step in flight, too
                self._policy.online_ended(ttft_s=got[0], tpot_s=got[1])
                if seen is not None and not self._is_probe(req):
                    seen.ended(now_s, got[1])
        if seen is not None:
            self._note_tokens(now_s, decoded, first, seen)

    def _counts(self, req: Req) -> bool:
        """Whether `req` got a token that a client waited for."""
        return bool(req.output_ids) and not req.online_clock.ended and not self._is_probe(req)

    @staticmethod
    def _note_tokens(now_s: float, decoded: int, first: list[Req], seen: OnlineLatencies) -> None:
        if decoded:
            seen.decoded(now_s, decoded)
        for req in first:
            ttft_s = now_s - req.online_clock.arrived_s
            seen.first_token(now_s, ttft_s, goes_on=not req.finished())
