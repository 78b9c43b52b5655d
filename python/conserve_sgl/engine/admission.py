"""What enters the engine in a step: SGLang's prefill pass, with offline work in it as planned.

put aside       an offline prompt between two chunks, while online prompts wait or the plan
                grants it nothing. SGLang continues its one chunked request before anything
                else and assumes that there is no other
load ahead      the KV of the next request that gave way, while there is no time for it
make way        rows, KV and adapters for the online prompts that SGLang is about to admit
candidates      offline requests behind the online ones in `waiting_queue`, for SGLang's own
                pass (`adder.py` lets them use what the plan grants) and no longer
go on           the prefill that is suspended between two layers, where nothing else is admitted
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from conserve_sgl.checkpoint.checkpointer import Checkpointer
from conserve_sgl.engine.adapters import Adapters
from conserve_sgl.engine.adder import ConserveAdder, OfflinePurse
from conserve_sgl.engine.aside import Aside
from conserve_sgl.engine.host import NextBatchPlan, PrefillAdder, Req, ScheduleBatch
from conserve_sgl.engine.intake import Intake
from conserve_sgl.engine.memory import KvMemory
from conserve_sgl.engine.observe import rest_of_prompt
from conserve_sgl.engine.shortage import Shortage
from conserve_sgl.policy import StepPlan, StepView

__all__ = ["Admission"]


class _Host(Protocol):
    """What of SGLang's scheduler is read here, and, of the first three, changed."""

    chunked_req: Req | None
    waiting_queue: list[Req]
    is_mixed_chunk: bool
    chunked_prefill_size: int
    enable_overlap: bool
    page_size: int
    req_to_token_pool: Any
    tp_size: int


class Admission:
    """Admits what the plan of a step lets in.

    Args:
        host: SGLang's scheduler, as it was set up: it mixes chunks with rows or not.
        intake: where offline requests wait, and online ones are announced.
        aside: what SGLang does not know of.
        memory: the KV pool, and who gives way in it.
        adapters: which of them may be in the engine.
        checkpoints: what requests that gave way have on the host.
        is_offline: tells an offline request.

    Attributes:
        short_of_adapters: whether the latest step could have let offline requests in, and had no
            place for the adapter of any that waits.
    """

    def __init__(
        self,
        host: _Host,
        *,
        intake: Intake,
        aside: Aside,
        memory: KvMemory,
        adapters: Adapters,
        checkpoints: Checkpointer,
        is_offline: Callable[[Req], bool],
    ) -> None:
        self._host = host
        self._intake = intake
        self._aside = aside
        self._slices = aside.slices
        self._memory = memory
        self._adapters = adapters
        self._checkpoints = checkpoints
        self._is_offline = is_offline
        self._always_mixes = host.is_mixed_chunk
        self._shortage = Shortage()
        self._purse: OfflinePurse | None = None
        self.short_of_adapters = False

    @property
    def short_of_kv(self) -> bool:
        """Whether the offline prompts that were tried last found no KV."""
        return self._shortage.found_no_kv

    # -------------------------------------------------------------------- the pass

    def form(
        self,
        running: ScheduleBatch,
        view: StepView,
        plan: StepPlan,
        form_theirs: Callable[[ScheduleBatch], NextBatchPlan],
    ) -> NextBatchPlan:
        """The prefill of the step, or none.

        Args:
            running: loses the rows that make way.
            view: what the step was planned by.
            plan: of the step.
            form_theirs: SGLang's `get_new_batch_prefill`.
        """
        self.short_of_adapters = False
        self._adapters.make_way(running)
        self._load_ahead(running, view, plan)
        self._mix(running, view, plan)
        if self._host.waiting_queue and self._memory.holds_offline(running):
            # SGLang takes a batch for full until a row ends; here rows give way.
            running.batch_is_full = False
            self._memory.make_rows(running, len(self._host.waiting_queue))
        if not self._chunk_finds_kv(running):
            return NextBatchPlan(batch_to_run=None, running_batch=running)
        free_tokens = self._memory.free_tokens - plan.kv_reserve_tokens
        admissions = self._admissions(running, plan, free_tokens)
        queue = self._intake.queue
        candidates = queue.take(admissions, self._adapters.may_run(running))
        self.short_of_adapters = bool(admissions and len(queue) and not candidates)
        not_yet = self._waiting_for_kv(candidates, running, plan)
        self._host.waiting_queue.extend(req for req in candidates if req not in not_yet)
        self._purse = None
        try:
            prefill = form_theirs(running)
            if candidates and self._purse is not None:
                self._shortage.note(free_tokens, found_no_kv=self._purse.found_no_kv)
            if prefill.batch_to_run is not None:
                self._checkpoints.admitted(prefill.batch_to_run, lagging=self._host.enable_overlap)
            return self._or_go_on(prefill, plan)
        finally:
            self._give_back(not_yet)

    def adder_class(self, view: StepView, plan: StepPlan) -> Callable[..., PrefillAdder]:
        """What SGLang admits with in this pass."""
        self._purse = OfflinePurse(
            tokens=plan.offline_prefill_tokens,
            kv_reserve_tokens=plan.kv_reserve_tokens,
            memory=self._memory,
            online_waits=bool(view.online_prompts),
            may_chunk=self._host.chunked_req is None and self._aside.chunk is None,
            is_offline=self._is_offline,
        )
        return partial(ConserveAdder, self._purse)

    def _mix(self, running: ScheduleBatch, view: StepView, plan: StepPlan) -> None:
        self._host.is_mixed_chunk = plan.mix or self._always_mixes
        if self._host.is_mixed_chunk:
            # A chunk of an online prompt goes with online rows alone.
            self._aside.sit_out(running, 0 if view.online_prompts else plan.offline_decode_rows)

    def _chunk_finds_kv(self, running: ScheduleBatch) -> bool:
        """Whether the next chunk of an online prompt finds KV, once offline requests gave way.

        SGLang takes that for granted and ends the engine if not: nothing decodes between two of
        its chunks. Here rows do, and grow.
        """
        host, chunk = self._host, self._host.chunked_req
        if chunk is None or self._is_offline(chunk):
            return True
        tokens = min(rest_of_prompt(chunk).new_tokens, host.chunked_prefill_size)
        tokens += host.page_size + (len(running.reqs) if host.is_mixed_chunk else 0)
        return self._memory.make_room(running, tokens, window_tokens=tokens)

    # ------------------------------------------------------------------- candidates

    def _admissions(self, running: ScheduleBatch, plan: StepPlan, free_tokens: int) -> int:
        """How many offline requests to try; none where they would find no KV, as a step ago."""
        if self._slices.suspended is not None or not plan.offline_admissions:
            return 0
        short = not running.is_empty() and self._shortage.lasts(free_tokens)
        if short:
            return 0
        return self._memory.admissible(len(self._host.waiting_queue), plan.offline_admissions)

    def _give_back(self, not_yet: list[Req]) -> None:
        """The candidates that were not admitted leave SGLang's queue again."""
        waiting = self._host.waiting_queue
        offline = [req for req in waiting if self._is_offline(req)]
        self._host.waiting_queue = [req for req in waiting if not self._is_offline(req)]
        self._intake.queue.give_back(offline)
        self._intake.queue.give_back(not_yet)
        for req in offline:
            self._checkpoints.states.take_back(req)

    def _load_ahead(self, running: ScheduleBatch, view: StepView, plan: StepPlan) -> None:
        """While there is no time for another offline request, the next one gets its KV from the
        host, unless online prompts are about to need the room."""
        if plan.offline_admissions or view.online_prompts or not view.offline_waiting:
            return
        req = self._intake.queue.next_that_gave_way(self._adapters.may_run(running))
        if req is not None:
            self._waiting_for_kv([req], running, plan)

    def _waiting_for_kv(self, reqs: list[Req], running: ScheduleBatch, plan: StepPlan) -> list[Req]:
        """Those of `reqs` whose KV is being loaded from the host: not to be admitted yet, since the
        rows that decode would wait for the copy. Where there are none, nobody does."""
        if running.is_empty():
            return []
        room_tokens = self._memory.free_tokens - plan.kv_reserve_tokens
        return self._checkpoints.load_ahead(reqs, room_tokens)

    # ------------------------------------------------- what was begun in another step

    def move_offline_chunk(self, plan: StepPlan) -> None:
        """Put an offline prompt aside between two chunks, or take it up again."""
        host, aside, tokens = self._host, self._aside, plan.offline_prefill_tokens
        granted = tokens > 0 and not host.waiting_queue and self._memory.free_tokens >= tokens
        granted = granted and self._slices.suspended is None
        if host.chunked_req is not None and self._is_offline(host.chunked_req) and not granted:
            aside.put_chunk(host.chunked_req)
            host.chunked_req = None
        elif host.chunked_req is None and aside.chunk is not None and granted:
            host.chunked_req, aside.chunk = aside.chunk, None

    def _or_go_on(self, formed: NextBatchPlan, plan: StepPlan) -> NextBatchPlan:
        """The suspended prefill goes on where no online prefill can run and the plan lets it."""
        host, suspended, running = self._host, self._slices.suspended, formed.running_batch
        if suspended is None or formed.batch_to_run is not None:
            return formed
        if host.waiting_queue and host.req_to_token_pool.available_size() == 0:
            self._memory.preempt_suspended()  # an online request waits for a row
            running.batch_is_full = False
            return formed
        if host.chunked_req is not None or not self._may_go_on(running, plan):
            return formed
        host.chunked_req = suspended.chunked_req
        return NextBatchPlan(batch_to_run=suspended, running_batch=running)

    def _may_go_on(self, running: ScheduleBatch, plan: StepPlan) -> bool:
        # Several ranks decide at the first layer boundary: each knows other times and arrivals.
        one_rank = self._host.tp_size == 1
        needed_s = self._slices.layer_s if one_rank else 0.0
        arriving = one_rank and self._intake.arriving > 0
        nothing_else = running.is_empty() and not self._host.waiting_queue and not arriving
        return nothing_else or plan.offline_slice_s > needed_s
