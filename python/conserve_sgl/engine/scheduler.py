"""SGLang's scheduler, with an offline queue beside its own and a plan for every step.

The event loops stay SGLang's. `get_next_batch_to_run` observes, asks the policy for a plan and
lets SGLang form the batch; the plan acts in two places that SGLang calls while it does so:
`get_new_batch_prefill` (what may be admitted) and `update_running_batch` (which rows decode).

Where an offline request may be, and who holds its row and KV:

    OfflineQueue            no row, no KV of its own (its prefix may be in the radix tree)
    waiting_queue           only within `get_new_batch_prefill`, for SGLang to admit it from
    chunked_req             row + KV so far; between two chunks
    running_batch           row + KV; decodes
    _aside                  row + KV; out of SGLang's sight (`aside.py`): a row that sits out, a
                            prompt between two chunks, a prefill suspended between two layers
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from http import HTTPStatus
from math import inf
from typing import Any

import numpy as np
from msgspec.structs import asdict, replace

from conserve_sgl.checkpoint.checkpointer import Checkpointer
from conserve_sgl.config import ConserveConfig
from conserve_sgl.engine.adder import ConserveAdder, OfflinePurse
from conserve_sgl.engine.aside import Aside
from conserve_sgl.engine.device import kv_token_bytes, marks_of
from conserve_sgl.engine.hidden_states import with_flat_hidden_states
from conserve_sgl.engine.host import (
    AbortReq,
    NextBatchPlan,
    PrefillAdder,
    Req,
    ScheduleBatch,
    SchedulePolicy,
    Scheduler,
    SetInternalStateReq,
    SetInternalStateReqOutput,
    _make_abort_req,
    get_schedule,
)
from conserve_sgl.engine.inbox import ArrivalInbox
from conserve_sgl.engine.invariants import with_parked_rows
from conserve_sgl.engine.ledger import OfflineLedger, is_aborted
from conserve_sgl.engine.memory import KvMemory
from conserve_sgl.engine.metering import StepMeter, work_of
from conserve_sgl.engine.metrics import Exporter
from conserve_sgl.engine.namesakes import namesakes_spared
from conserve_sgl.engine.observe import (
    OnlineClock,
    RowCount,
    rest_of_prompt,
    running_rows,
    waiting_prompts,
)
from conserve_sgl.engine.offline_item import offline_item
from conserve_sgl.engine.profiling import load_or_measure
from conserve_sgl.engine.ranks import from_rank_zero, int_of_rank_zero
from conserve_sgl.engine.shortage import Shortage
from conserve_sgl.engine.slices import SUSPENDED, LayerSlices
from conserve_sgl.errors import IncompatibleError, SettingError
from conserve_sgl.ingress.arrival import arrival_endpoint
from conserve_sgl.policy import (
    OfflineQueue,
    OnlineReserve,
    PriorityRule,
    Rows,
    SlackBudget,
    Starvation,
    StepPlan,
    StepView,
    most_offline_rows,
)
from conserve_sgl.policy.latency import StepKind, StepSample, prompt_token_s
from conserve_sgl.profile.steps import StepLog
from conserve_sgl.settings import OfflineWork, Settings, is_setting

__all__ = ["ConserveScheduler"]

logger = logging.getLogger(__name__)

_NO_PLAN = StepPlan(
    offline_prefill_tokens=0,
    offline_admissions=0,
    offline_decode_rows=0,
    kv_reserve_tokens=0,
)


class _OnlineFirst(SchedulePolicy):
    """SGLang's order of the waiting queue, then online before offline; the order is stable."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_offline = lambda _req: False

    def calc_priority(self, waiting_queue: list[Req], *args: Any, **kwargs: Any) -> bool:
        matched = super().calc_priority(waiting_queue, *args, **kwargs)
        waiting_queue.sort(key=self.is_offline)
        return matched


class ConserveScheduler(Scheduler):
    """One engine for online requests and offline work; online first."""

    # ------------------------------------------------------------------ set-up

    def __init__(self, server_args: Any, port_args: Any) -> None:
        super().__init__(server_args, port_args)
        # All is set up, and the parent has not been told yet that requests may come.
        self._meter = StepMeter(marks_of(self))
        self.latency = load_or_measure(self, self._counts)
        self._checkpoints.token_s = prompt_token_s(self.latency.predict_s)
        self._step_policy = SlackBudget(
            self.latency,
            slo=self._slo,
            yield_s=self._config.slo.yield_ms / 1000,
            reserve=OnlineReserve(at_most=self._config.memory.online_reserve),
            smallest_chunk=max(self.page_size, 32),
            min_share=self._config.offline.min_share,
        )
        self._biased = False
        self._starvation = Starvation()
        self._step_log = StepLog.of_environment() if self.tp_group.is_first_rank else StepLog()

    def init_ipc_channels(self, port_args: Any) -> None:
        super().init_ipc_channels(port_args)
        rank_zero = self.recv_from_tokenizer is not None
        self._inbox = ArrivalInbox(arrival_endpoint(port_args.instance_id)) if rank_zero else None

    def init_running_status(self) -> None:
        super().init_running_status()
        if self.is_hybrid_swa or self.is_hybrid_ssm:
            raise IncompatibleError(
                "models with sliding-window or state-space layers are not supported by conserve"
            )
        config = ConserveConfig.from_environment() or ConserveConfig()
        self._rule = PriorityRule.of(get_schedule())
        self._offline_queue: OfflineQueue[Req] = OfflineQueue(
            config.offline.queue_requests, no_deadline_share=config.offline.no_deadline_share
        )
        self._ledger = OfflineLedger(self._offline_queue, self.is_offline)
        self._settings = Settings(config.slo, batches_held=config.batch.start == "held")
        self._slo = config.slo.objectives()
        self._view = StepView(now_s=time.monotonic())
        self._plan = _NO_PLAN
        self._rows_decoded = True
        self._shortage = Shortage()
        self._purse: OfflinePurse | None = None
        self._counts = self._ledger.counts
        self._always_mixes = False
        self._config = config
        self._slices = LayerSlices(
            self.tp_worker.model_runner,
            config,
            layer_s=lambda batch: self.latency.layer_s(work_of(batch), 1),
            inbox=self._inbox,
            agree=partial(int_of_rank_zero, self.tp_group),
            load_counter=self.tp_worker.hicache_layer_transfer_counter,
        )
        self._aside = Aside(self._slices)

    def init_chunked_prefill(self) -> None:
        super().init_chunked_prefill()
        if self.chunked_prefill_size is None:
            raise IncompatibleError("conserve needs chunked prefill, and SGLang turned it off here")
        self._always_mixes = self.is_mixed_chunk

    def init_schedule_policy(self) -> None:
        super().init_schedule_policy()
        self.policy = _OnlineFirst(
            self.schedule_policy,
            self.tree_cache,
            self.enable_hierarchical_cache,
            self.enable_priority_scheduling,
            self.schedule_low_priority_values_first,
        )
        self.policy.is_offline = self.is_offline
        self._checkpoints = Checkpointer(
            self.tree_cache,
            self._config.checkpoint,
            max_total_tokens=self.max_total_num_tokens,
            token_bytes=kv_token_bytes(self.token_to_kv_pool_allocator.get_kvcache()),
            is_offline=self.is_offline,
        )
        self._memory = KvMemory(
            self.tree_cache,
            total_tokens=self.max_total_num_tokens,
            checkpoints=self._checkpoints,
            aside=self._aside,
            is_offline=self.is_offline,
            requeue=partial(self._add_request_to_queue, is_retracted=True),
            free_rows=self.req_to_token_pool.available_size,
        )

    def init_metrics_reporter(self) -> None:
        super().init_metrics_reporter()
        here = self.metrics_collector_context.current_scheduler_metrics_enabled
        self._exporter = Exporter(self.metrics_collector.labels) if here else None

    def init_batch_result_processor(self) -> None:
        super().init_batch_result_processor()
        self.batch_result_processor = with_flat_hidden_states(self.batch_result_processor)

    def init_invariant_checker(self) -> None:
        super().init_invariant_checker()
        self.invariant_checker = with_parked_rows(self.invariant_checker, lambda: self._aside.reqs)

    # ------------------------------------------------------- requests coming in

    def is_offline(self, req: Req) -> bool:
        """Whether `req` is offline work: the tokenizer process stamped its priority."""
        return self._rule.is_offline(req.priority)

    def ingest_requests(self, stop_at_pause: bool = False) -> list:
        if self._inbox is not None:
            self._inbox.poll()
        return super().ingest_requests(stop_at_pause)

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        if not self.is_offline(req):
            self._start_clock(req)
            super()._add_request_to_queue(req, is_retracted)
        elif is_retracted or req.retracted_stain:
            self._checkpoints.gave_way(req)
            self._counts["offline_preempted"] += 1
            self._offline_queue.give_back([req])
        elif self._offline_queue.push(req, offline_item(req)):
            self._counts["offline_accepted"] += 1
            req.time_stats.set_wait_queue_entry_time()
        else:
            self._counts["offline_refused"] += 1
            full = f"The offline queue is full ({self._offline_queue.capacity} requests)."
            self._refuse(req, HTTPStatus.TOO_MANY_REQUESTS, full)

    def _start_clock(self, req: Req) -> None:
        """Once for each online request; one that was retracted keeps its clock."""
        announced_s = None if self._inbox is None else self._inbox.reached(req.rid)
        if not hasattr(req, "online_clock"):
            req.online_clock = OnlineClock(announced_s or time.monotonic())

    def _refuse(self, req: Req, status: HTTPStatus, message: str) -> None:
        self._release_aborted_request(req)
        reason = {"type": "abort", "status_code": status, "message": message}
        self.send_abort_output(_make_abort_req(req, finished_reason=reason), req)

    # ------------------------------------------------------------------ the step

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> NextBatchPlan:
        self._aside.parked.drop_finished()
        self._view = view = self._observe(running_batch, last_batch)
        self._plan = from_rank_zero(self.tp_group, lambda: self._step_policy.plan(view))
        rows_to_spare = self._plan.offline_decode_rows - view.offline_decoding.count
        running_batch = self._aside.parked.come_back(running_batch, rows_to_spare)
        next_plan = super().get_next_batch_to_run(running_batch, last_batch)
        self._account(next_plan.batch_to_run)
        self._learn(self._meter.started(next_plan.batch_to_run))
        return next_plan

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        if result is SUSPENDED:
            self.maybe_send_health_check_signal()
            self._learn(self._meter.finished())
            return
        self._note_online_prefill(batch)
        super().process_batch_result(batch, result)
        self._note_online_ends(batch)
        self._learn(self._meter.finished())
        # Nothing here that ranks see differently, such as arrivals: their trees must stay alike.
        tight = bool(self.waiting_queue or self._view.online_prompts)
        self._checkpoints.after_result(batch, online_tight=tight)

    def _note_online_prefill(self, batch: ScheduleBatch) -> None:
        if batch.forward_mode.is_extend() and not all(map(self.is_offline, batch.reqs)):
            self._slices.online_prefill_took(time.monotonic() - batch.launch_ts)

    def _note_online_ends(self, batch: ScheduleBatch) -> None:
        now_s = time.monotonic()
        for req in batch.reqs:
            if self.is_offline(req) or not req.finished() or is_aborted(req):
                continue
            got = req.online_clock.end(now_s, len(req.output_ids))
            if got is not None:  # a request that ended may be in the step in flight, too
                self._step_policy.online_ended(ttft_s=got[0], tpot_s=got[1])

    def _learn(self, steps: list[StepSample]) -> None:
        for step in steps:
            self.latency.observe(step.work, step.seconds)
            self._step_log.write(step)
        if self.latency.is_biased is not self._biased:
            self._biased = self.latency.is_biased
            logger.warning(
                "the latency model is %s: the last steps differ from it by %+.0f%% in the median",
                "off" if self._biased else "right again",
                self.latency.bias * 100,
            )

    def _observe(self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None) -> StepView:
        now_s = time.monotonic()
        count = RowCount(self._step_policy.pace, now_s, self.is_offline)
        running_rows(
            count, running_batch, last_batch, self.chunked_req, overlap=self.enable_overlap
        )
        chunk_is_offline = self.chunked_req is not None and self.is_offline(self.chunked_req)
        offline_chunk = self.chunked_req if chunk_is_offline else self._aside.chunk
        online_chunk = None if chunk_is_offline else self.chunked_req
        offline_waiting = len(self._offline_queue)
        if self._settings.holds_offline:
            offline_chunk, offline_waiting = None, 0
        parked = self._aside.parked.reqs
        return StepView(
            now_s=now_s,
            free_at_s=self._meter.busy_until_s(self.latency.predict_s),
            online_arriving=self._arriving(),
            online_prompts=waiting_prompts(self._slo, online_chunk, self.waiting_queue),
            online_decoding=count.online,
            online_due_s=count.online_due_s,
            online_late_s=count.online_late_s,
            offline_waiting=offline_waiting,
            offline_chunk=None if offline_chunk is None else rest_of_prompt(offline_chunk),
            offline_decoding=count.offline,
            offline_parked=Rows(len(parked), sum(req.seqlen for req in parked)),
            offline_suspended=len(self._slices.suspended_reqs),
            free_rows=self.req_to_token_pool.available_size(),
            max_rows=most_offline_rows(self.max_running_requests),
            free_kv_tokens=self._memory.free_tokens,
            total_kv_tokens=self.max_total_num_tokens,
            chunk_tokens=self.chunked_prefill_size,
            rows_decoded=self._rows_decoded,
            can_mix=not running_batch.return_logprob,
            interruptible=self._slices.enabled,
        )

    def _arriving(self) -> int:
        return 0 if self._inbox is None else len(self._inbox)

    def _account(self, batch: ScheduleBatch | None) -> None:
        now_s = time.monotonic()
        # A prefill that goes on was counted when it began.
        self._ledger.step(now_s, None if batch is self._slices.suspended else batch)
        self._notice_starvation(now_s, batch)
        if self._exporter is not None and self._exporter.is_due(now_s):
            self._exporter.write(now_s, self._state(), self._new_latencies_ms())
        mode = None if batch is None else batch.forward_mode
        self._rows_decoded = mode is None or mode.is_mixed() or not mode.is_extend()

    def _notice_starvation(self, now_s: float, batch: ScheduleBatch | None) -> None:
        view = self._view
        waits = not self._settings.holds_offline and bool(
            view.offline_waiting or view.offline_resident
        )
        runs = batch is not None and any(map(self.is_offline, batch.reqs))
        said = self._starvation.look(now_s, self._plan.bound, waits=waits, runs=runs)
        if said is not None:
            logger.warning("conserve: %s", said)

    def _new_latencies_ms(self) -> list[float]:
        return [] if self._inbox is None else self._inbox.new_latencies_ms()

    # ----------------------------------------------------- the plan, for prefill

    def get_prefill_adder_class(self) -> Callable[..., PrefillAdder]:
        plan = self._plan
        self._purse = OfflinePurse(
            tokens=plan.offline_prefill_tokens,
            kv_reserve_tokens=plan.kv_reserve_tokens,
            memory=self._memory,
            online_waits=bool(self._view.online_prompts),
            may_chunk=self.chunked_req is None and self._aside.chunk is None,
            is_offline=self.is_offline,
        )
        return partial(ConserveAdder, self._purse)

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        plan = self._plan
        self._move_offline_chunk()
        if self._settings.holds_offline:
            self._hold_offline(running_batch)
        self._load_ahead(running_batch)
        self.is_mixed_chunk = plan.mix or self._always_mixes
        if self.is_mixed_chunk:
            # A chunk of an online prompt goes with online rows alone.
            rows = 0 if self._view.online_prompts else plan.offline_decode_rows
            self._sit_out_surplus(running_batch, rows)
        if self.waiting_queue and self._memory.holds_offline(running_batch):
            # SGLang takes a batch for full until a row ends; here rows give way.
            running_batch.batch_is_full = False
            self._memory.make_rows(running_batch, 1)
        if not self._chunk_finds_kv(running_batch):
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        free_tokens = self._memory.free_tokens - plan.kv_reserve_tokens
        candidates = self._offline_queue.take(self._admissions(running_batch, free_tokens))
        not_yet = self._waiting_for_kv(candidates, running_batch)
        self.waiting_queue.extend(req for req in candidates if req not in not_yet)
        self._purse = None
        try:
            prefill = super().get_new_batch_prefill(running_batch)
            if candidates and self._purse is not None:
                self._shortage.note(free_tokens, found_no_kv=self._purse.found_no_kv)
            if prefill.batch_to_run is not None:
                self._checkpoints.admitted(prefill.batch_to_run, lagging=self.enable_overlap)
            return self._or_go_on(prefill)
        finally:
            waiting, self.waiting_queue = self.waiting_queue, []
            for req in waiting:
                if not self.is_offline(req):
                    self.waiting_queue.append(req)
            self._offline_queue.give_back(r for r in waiting if self.is_offline(r))
            self._offline_queue.give_back(not_yet)

    def _admissions(self, running_batch: ScheduleBatch, free_tokens: int) -> int:
        """How many offline requests to try; none where they would find no KV, as a step ago."""
        if self._slices.suspended is not None or not self._plan.offline_admissions:
            return 0
        short = not running_batch.is_empty() and self._shortage.lasts(free_tokens)
        return 0 if short else self._plan.offline_admissions

    def _hold_offline(self, running_batch: ScheduleBatch) -> None:
        """Take rows and KV from all offline requests, and their place in the queue if they end."""
        self._memory.preempt_all(running_batch)
        if self._settings.offline is OfflineWork.ENDS:
            for req in self._take_queued(None):
                self._refuse(req, HTTPStatus.SERVICE_UNAVAILABLE, "The server is shutting down.")

    def _load_ahead(self, running_batch: ScheduleBatch) -> None:
        """While there is no time for another offline request, the next one gets its KV from the
        host, unless online prompts are about to need the room."""
        view = self._view
        if self._plan.offline_admissions or view.online_prompts or not view.offline_waiting:
            return
        req = self._offline_queue.next_that_gave_way()
        if req is not None:
            self._waiting_for_kv([req], running_batch)

    def _waiting_for_kv(self, reqs: list[Req], running_batch: ScheduleBatch) -> list[Req]:
        """Those of `reqs` whose KV is being loaded from the host: not to be admitted yet, since the
        rows that decode would wait for the copy. Where there are none, nobody does."""
        if running_batch.is_empty():
            return []
        room_tokens = self._memory.free_tokens - self._plan.kv_reserve_tokens
        return self._checkpoints.load_ahead(reqs, room_tokens)

    def _chunk_finds_kv(self, running_batch: ScheduleBatch) -> bool:
        """Whether the next chunk of an online prompt finds KV, once offline requests gave way.

        SGLang takes that for granted and ends the engine if not: nothing decodes between two of
        its chunks. Here rows do, and grow.
        """
        chunk = self.chunked_req
        if chunk is None or self.is_offline(chunk):
            return True
        tokens = min(rest_of_prompt(chunk).new_tokens, self.chunked_prefill_size)
        tokens += self.page_size + (len(running_batch.reqs) if self.is_mixed_chunk else 0)
        return self._memory.make_room(running_batch, tokens)

    def _or_go_on(self, next_plan: NextBatchPlan) -> NextBatchPlan:
        """The suspended prefill goes on where no online prefill can run and the plan lets it."""
        suspended, running = self._slices.suspended, next_plan.running_batch
        if suspended is None or next_plan.batch_to_run is not None:
            return next_plan
        if self.waiting_queue and self.req_to_token_pool.available_size() == 0:
            self._memory.preempt_suspended()  # an online request waits for a row
            running.batch_is_full = False
            return next_plan
        if self.chunked_req is not None or not self._may_go_on(running):
            return next_plan
        self.chunked_req = suspended.chunked_req
        return NextBatchPlan(batch_to_run=suspended, running_batch=running)

    def _may_go_on(self, running: ScheduleBatch) -> bool:
        # Several ranks decide at the first layer boundary: each knows other times and arrivals.
        needed_s = self._slices.layer_s if self.tp_size == 1 else 0.0
        arriving = self.tp_size == 1 and self._arriving() > 0
        nothing_else = running.is_empty() and not self.waiting_queue and not arriving
        return nothing_else or self._plan.offline_slice_s > needed_s

    def _move_offline_chunk(self) -> None:
        """Put an offline prompt aside between two chunks, or take it up again.

        SGLang continues its one chunked request before anything else and assumes that there is no
        other, so an offline one stays out of its sight while online prompts wait or while the
        plan grants it no tokens.
        """
        tokens = self._plan.offline_prefill_tokens
        granted = tokens > 0 and not self.waiting_queue and self._memory.free_tokens >= tokens
        granted = granted and self._slices.suspended is None
        if self.chunked_req is not None and self.is_offline(self.chunked_req) and not granted:
            assert self._aside.chunk is None  # the adder chunks one offline prompt at a time
            self._aside.chunk, self.chunked_req = self.chunked_req, None
            self._counts["offline_chunks_parked"] += 1
        elif self.chunked_req is None and self._aside.chunk is not None and granted:
            self.chunked_req, self._aside.chunk = self._aside.chunk, None

    # ------------------------------------------------- offline prefills, in slices

    def is_disable_overlap_for_batch(
        self, batch: ScheduleBatch | None, last_batch: ScheduleBatch | None
    ) -> bool:
        # Slices keep the event loop for as long as they run: what the last batch gave leaves first.
        if batch is not None and self.result_queue and self._runs_in_slices(batch):
            return True
        return super().is_disable_overlap_for_batch(batch, last_batch)

    def _runs_in_slices(self, batch: ScheduleBatch) -> bool:
        return self._slices.accepts(batch, self.is_offline, fresh=self._plan.in_slices)

    def run_batch(self, batch: ScheduleBatch, pp_proxy_tensors: Any = None) -> Any:
        if not self._runs_in_slices(batch):
            result = super().run_batch(batch, pp_proxy_tensors)
            self._meter.launched()
            return result
        goes_on = batch is self._slices.suspended
        run = partial(super().run_batch, batch, pp_proxy_tensors)
        result = self._slices.run(batch, run, until_s=self._slices_end_s())
        self._meter.launched()
        if goes_on or result is SUSPENDED:
            self._meter.skip()
        if result is SUSPENDED:
            self._leave_suspended(batch)
        elif (chunk := batch.chunked_req) is not None and chunk.to_finish is not None:
            self._pending_chunked_abort_req = chunk
        return result

    def _slices_end_s(self) -> float:
        # Where nothing else is there to run, an offline prefill may run without a grant of time.
        granted_s = self._plan.offline_slice_s if not self.running_batch.is_empty() else inf
        return time.monotonic() + granted_s

    def _leave_suspended(self, batch: ScheduleBatch) -> None:
        self.processed_tokens_counter -= batch.extend_num_tokens  # SGLang counts them every time
        if batch.chunked_req is not None:
            # SGLang would take the chunk's KV for computed, and could chunk no online prompt.
            self.chunked_req = None

    def _collect_inflight_batches(self) -> list[ScheduleBatch | None]:
        return [*super()._collect_inflight_batches(), self._slices.suspended]

    # ------------------------------------------------------ the plan, for decode

    def update_running_batch(self, batch: ScheduleBatch) -> ScheduleBatch | None:
        self._sit_out_surplus(batch, self._plan.offline_decode_rows)
        self._memory.preempt_at_random(batch)
        if batch.is_empty():
            return batch
        enough = self._memory.give_way(
            batch, lambda: self._memory.is_left_to(batch) or batch.check_decode_mem()
        )
        if not enough and self._checkpoints.backlog_tokens():
            return None  # KV that is pinned until it is copied comes free in a moment
        if not enough and self.chunked_req is not None and len(batch.reqs) == 1:
            # To SGLang nobody else holds KV, and it would end the row instead of retracting it.
            self._memory.preempt_rows(batch, list(batch.reqs), urgent=True)
        return batch if batch.is_empty() else super().update_running_batch(batch)

    def _sit_out_surplus(self, batch: ScheduleBatch, rows: int) -> None:
        offline = sum(map(self.is_offline, batch.reqs))
        parked = self._aside.parked.sit_out(batch, offline - rows, self.is_offline)
        self._counts["offline_rows_parked"] += parked

    # ------------------------------------- everything else that looks at requests

    def abort_request(self, recv_req: AbortReq) -> None:
        rid = None if recv_req.abort_all else recv_req.rid
        aside = self._aside.take(lambda req: rid in (None, req.rid))
        for req in aside:
            self._checkpoints.release(req)
            self._ledger.close(time.monotonic(), req)
        queued = self._take_queued(rid)
        # Now they are queued requests like any other, and SGLang's own code aborts those.
        self.waiting_queue += aside + queued
        with nullcontext() if rid is None else namesakes_spared(self, rid):
            super().abort_request(recv_req)
        self._drop_aborted_slices()

    def _take_queued(self, rid: str | None) -> list[Req]:
        """Take the request of that id out of the queue, or all; they are about to be answered."""
        queue = self._offline_queue
        queued = queue.remove(lambda _: True) if rid is None else queue.remove_rid(rid)
        self._checkpoints.forget(queued)
        self._ledger.removed(queued)
        return queued

    def _drop_aborted_slices(self) -> None:
        """End a suspended prefill that nobody waits for any more.

        SGLang has marked the requests to be aborted. While others of the batch go on, they are
        computed along with them and end with the prefill, as in any batch that runs.
        """
        reqs = self._slices.suspended_reqs
        if not reqs or any(req.to_finish is None for req in reqs):
            return
        for req in self._slices.give_up():
            self._checkpoints.release(req)
            self._ledger.close(time.monotonic(), req)
            self._release_aborted_request(req)
            reason = req.to_finish.to_json()
            self.send_abort_output(_make_abort_req(req, finished_reason=reason), req)

    def pause_generation(self, recv_req: Any) -> None:
        super().pause_generation(recv_req)
        self._meter.forget()
        if recv_req.mode == "retract":
            self._memory.preempt_all_aside()

    def is_fully_idle(self, for_health_check: bool = False, ignore_waiting: bool = False) -> bool:
        if not super().is_fully_idle(for_health_check, ignore_waiting):
            return False
        if for_health_check:
            # Only a running batch answers a health check that was skipped.
            return True
        return not self._aside.reqs and (ignore_waiting or len(self._offline_queue) == 0)

    def flush_cache(self, empty_cache: bool = True) -> bool:
        flushed = super().flush_cache(empty_cache)
        if flushed:
            self._checkpoints.cache_emptied()
        return flushed

    def set_internal_state(self, recv_req: SetInternalStateReq) -> SetInternalStateReqOutput:
        asked = recv_req.server_args
        theirs = {name: number for name, number in asked.items() if not is_setting(name)}
        try:
            settings = self._settings.changed_by(
                {name: number for name, number in asked.items() if is_setting(name)}
            )
        except SettingError as e:
            logger.warning("conserve: nothing is changed: %s", e)
            return SetInternalStateReqOutput(updated=False)
        if theirs:
            output = super().set_internal_state(replace(recv_req, server_args=theirs))
            if not output.updated:
                return output
        self._use(settings)
        return SetInternalStateReqOutput(updated=True)

    def _use(self, settings: Settings) -> None:
        if settings == self._settings:
            return
        logger.info("conserve: from here on %s", settings)
        self._settings, self._slo = settings, settings.slo.objectives()
        self._step_policy.aim_at(self._slo, yield_s=settings.slo.yield_ms / 1000)
        self._slices.aim_at(settings.slo)

    def get_internal_state(self, recv_req: Any) -> Any:
        output = super().get_internal_state(recv_req)
        self._ledger.close_finished(time.monotonic())  # all ranks are asked, in the same step
        output.internal_state["conserve"] = self._state()
        return output

    def _state(self) -> dict[str, Any]:
        """What `/server_info` shows under `internal_states[i].conserve`."""
        latencies_ms = [] if self._inbox is None else self._inbox.latencies_ms()
        p50, p99 = np.percentile(latencies_ms or [0.0], (50, 99)).tolist()
        return {
            **self._ledger.state(time.monotonic(), parked=len(self._aside.whole)),
            "offline_paused": self._settings.holds_offline,
            "offline_starved_s": self._starvation.seconds,
            "offline_bound": str(self._plan.bound),
            "batches_held": self._settings.batches_held,
            "slo": asdict(self._settings.slo),
            "margins": self._step_policy.margins,
            "checkpoint": self._checkpoints.state(),
            "latency": self._latency_state(),
            "arrivals_received": 0 if self._inbox is None else self._inbox.received,
            "arrival_ms": {"p50": p50, "p99": p99},
            "slices": self._slices.state(),
        }

    def _latency_state(self) -> dict[str, Any]:
        model = self.latency
        errors = {kind.name.lower(): asdict(model.errors(kind)) for kind in StepKind}
        return {
            "coefficients_s": asdict(model.coefficients),
            "errors": errors,
            "bias": model.bias,
            "is_biased": model.is_biased,
        }
