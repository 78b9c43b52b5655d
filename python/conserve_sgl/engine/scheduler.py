"""SGLang's scheduler, with an offline queue beside its own and a plan for every step.

The event loops stay SGLang's. A step is, in `get_next_batch_to_run`:

    observe     what the engine holds, as a frozen StepView          `observe.py`
    plan        the policy's answer, a frozen StepPlan               `policy/`
    form        SGLang's own code forms the batch; the plan acts in two places that it calls:
                what may be admitted                                 `admission.py`
                which rows decode, and who gives way for them        `aside.py`, `memory.py`
    act         `run_batch`: an offline prefill may run in slices    `sliced_step.py`, `slices.py`
    account     what the step was, took and left behind              `accounts.py`, `learning.py`

What is overridden of SGLang, and what conserve adds to it:

    __init__                        the latency profile, and what plans by it
    init_ipc_channels               the inbox of announced arrivals
    init_running_status             settings, the offline queue, what is put aside, memory
    init_schedule_policy            online first in the waiting queue; admission
    init_lora_drainer               adapters drain for online requests alone
    init_invariant_checker          rows that are put aside are no leaks
    init_batch_result_processor     hidden states of requests that were preempted
    ingest_requests                 arrivals are read before requests
    _add_request_to_queue           offline requests go to the offline queue
    get_next_batch_to_run           observe, plan, (form,) account
    get_new_batch_prefill           form: what may be admitted
    get_prefill_adder_class         form: by which account
    update_running_batch            form: which rows decode
    is_disable_overlap_for_batch    act: what the last batch gave leaves before slices run
    run_batch                       act: in slices
    process_batch_result            act: checkpoints of what decoded; a suspended batch gave nothing
    _collect_inflight_batches       the suspended batch is in flight, too
    abort_request                   requests in the offline queue and aside are aborted as well
    pause_generation                mode `retract` takes back what is aside
    is_fully_idle                   not while offline requests wait or are aside
    flush_cache                     checkpoints are gone with it
    get_init_info                   says to the HTTP process that this scheduler is conserve's
    set_internal_state              conserve's settings
    get_internal_state              conserve's state

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
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from conserve_sgl.checkpoint.checkpointer import Checkpointer
from conserve_sgl.config import ConserveConfig
from conserve_sgl.engine.accounts import Accounts
from conserve_sgl.engine.adapters import Adapters, OnlineDrainer
from conserve_sgl.engine.admission import Admission
from conserve_sgl.engine.aside import Aside
from conserve_sgl.engine.capabilities import Host, decide
from conserve_sgl.engine.device import kv_token_bytes, marks_of
from conserve_sgl.engine.hidden_states import with_flat_hidden_states
from conserve_sgl.engine.host import (
    AbortReq,
    GetInternalStateReqOutput,
    NextBatchPlan,
    PrefillAdder,
    Req,
    ScheduleBatch,
    Scheduler,
    SetInternalStateReq,
    SetInternalStateReqOutput,
    envs,
    get_schedule,
    is_health_check_generate_req,
)
from conserve_sgl.engine.inbox import ArrivalInbox
from conserve_sgl.engine.intake import Intake
from conserve_sgl.engine.invariants import with_parked_rows
from conserve_sgl.engine.learning import Learning
from conserve_sgl.engine.ledger import OfflineLedger
from conserve_sgl.engine.live_settings import LiveSettings
from conserve_sgl.engine.memory import KvMemory
from conserve_sgl.engine.metrics import Exporter
from conserve_sgl.engine.namesakes import namesakes_spared
from conserve_sgl.engine.observe import Observer
from conserve_sgl.engine.profiling import load_or_measure
from conserve_sgl.engine.ranks import from_rank_zero, int_of_rank_zero
from conserve_sgl.engine.sliced_step import run_in_slices
from conserve_sgl.engine.slices import SUSPENDED, LayerSlices
from conserve_sgl.engine.spare import SpareCapacity
from conserve_sgl.engine.status import Status
from conserve_sgl.engine.step_meter import StepMeter
from conserve_sgl.engine.step_recorder import StepRecorder
from conserve_sgl.engine.waiting_order import OnlineFirst
from conserve_sgl.errors import IncompatibleError
from conserve_sgl.ingress.arrival import arrival_endpoint
from conserve_sgl.ingress.spare import SpareSender, spare_endpoint
from conserve_sgl.policy import OfflineQueue, PriorityRule, StepPlan
from conserve_sgl.policy.latency import prompt_token_s
from conserve_sgl.profile.steps import StepLog
from conserve_sgl.settings import OfflineWork
from conserve_sgl.status.ask import Ask
from conserve_sgl.status.latency import OnlineLatencies

__all__ = ["ConserveScheduler"]

logger = logging.getLogger(__name__)

_NO_PLAN = StepPlan(
    offline_prefill_tokens=0,
    offline_admissions=0,
    offline_decode_rows=0,
    kv_reserve_tokens=0,
)


class ConserveScheduler(Scheduler):
    """One engine for online requests and offline work; online first."""

    # ------------------------------------------------------------------ set-up

    def __init__(self, server_args: Any, port_args: Any) -> None:
        super().__init__(server_args, port_args)
        # All is set up, and the parent has not been told yet that requests may come.
        ledger, inbox, shown = self._intake.ledger, self._inbox, self._live.config.status.enabled
        recorder = StepRecorder(ledger, self._aside, inbox) if shown else None
        latencies = OnlineLatencies() if shown else None
        self._learning = Learning(StepMeter(marks_of(self), listener=recorder))
        model = load_or_measure(self, ledger.counts)
        log = StepLog.of_environment() if self.tp_group.is_first_rank else StepLog()
        self._learning.begin(model, log)
        self._checkpoints.token_s = prompt_token_s(model.predict_s)
        self._budget = budget = self._live.config.budget(model, page_tokens=self.page_size)
        self._live.on_change(
            lambda slo: budget.aim_at(slo.objectives(), yield_s=slo.yield_ms / 1000)
        )
        self._observer = Observer(
            self,
            policy=budget,
            live=self._live,
            intake=self._intake,
            aside=self._aside,
            memory=self._memory,
            learning=self._learning,
            is_offline=self.is_offline,
            is_probe=is_health_check_generate_req,
            latencies=latencies,
        )
        is_heard = inbox is not None
        sender = SpareSender(spare_endpoint(port_args.instance_id)) if is_heard else None
        exports = self.metrics_collector_context.current_scheduler_metrics_enabled
        self._accounts = Accounts(
            self._intake,
            live=self._live,
            budget=budget,
            model=model,
            checkpoints=self._checkpoints,
            aside=self._aside,
            spare=SpareCapacity(ledger, sender),
            exporter=Exporter(self.metrics_collector.labels) if exports else None,
            is_offline=self.is_offline,
            admission=self._admission,
            recorder=recorder,
            latencies=latencies,
        )
        self._status = Status(
            self,
            accounts=self._accounts,
            intake=self._intake,
            live=self._live,
            budget=budget,
            memory=self._memory,
            recorder=recorder,
            latencies=latencies,
        )

    def init_ipc_channels(self, port_args: Any) -> None:
        super().init_ipc_channels(port_args)
        rank_zero = self.recv_from_tokenizer is not None
        self._inbox = ArrivalInbox(arrival_endpoint(port_args.instance_id)) if rank_zero else None

    def init_running_status(self) -> None:
        super().init_running_status()
        if self.is_hybrid_ssm and not self.spec_algorithm.is_none():
            raise IncompatibleError(
                "speculative decoding of models with state-space layers is not supported by "
                "conserve: leave --speculative-algorithm out"
            )
        if self.is_hybrid_swa and not self.full_tokens_per_layer:
            raise IncompatibleError(
                "models whose layers all have a sliding window are not supported by conserve"
            )
        config = ConserveConfig.from_environment() or ConserveConfig()
        drops_windows = envs.SGLANG_OPT_RELEASE_PREFILL_SWA.get()
        host = Host.of_scheduler(self, drops_windows=drops_windows)
        capabilities = decide(host, config)
        if self.tp_group.is_first_rank:
            logger.info("conserve: %s", capabilities.table)
        self._live = LiveSettings(config, capabilities)
        self._rule = PriorityRule.of(get_schedule())
        self._plan = _NO_PLAN
        queue: OfflineQueue[Req] = OfflineQueue(
            config.offline.queue_requests, no_deadline_share=config.offline.no_deadline_share
        )
        ledger = OfflineLedger(queue, self.is_offline)
        slices = LayerSlices(
            self.tp_worker.model_runner,
            config,
            enabled=capabilities.slices.on,
            is_offline=self.is_offline,
            layer_s=lambda batch: self._learning.layer_s(batch),
            inbox=self._inbox,
            agree=partial(int_of_rank_zero, self.tp_group),
            load_counter=self.tp_worker.hicache_layer_transfer_counter,
        )
        self._live.on_change(slices.aim_at)
        self._aside = Aside(slices, self.is_offline, ledger.counts)
        self._checkpoints = Checkpointer(
            self.tree_cache,
            config.checkpoint,
            enabled=capabilities.checkpoints.on,
            copies=capabilities.host_copies.on,
            max_total_tokens=self.max_total_num_tokens,
            token_bytes=kv_token_bytes(self.token_to_kv_pool_allocator.get_kvcache()),
            is_offline=self.is_offline,
        )
        self._intake = Intake(
            queue,
            ledger,
            inbox=self._inbox,
            aside=self._aside,
            checkpoints=self._checkpoints,
            release=self._release_aborted_request,
            send_abort=self.send_abort_output,
        )

    def init_schedule_policy(self) -> None:
        super().init_schedule_policy()
        if self.chunked_prefill_size is None:
            raise IncompatibleError("conserve needs chunked prefill, and SGLang turned it off here")
        self.policy = OnlineFirst(
            self.is_offline,
            self.schedule_policy,
            self.tree_cache,
            self.enable_hierarchical_cache,
            self.enable_priority_scheduling,
            self.schedule_low_priority_values_first,
        )
        self._memory = KvMemory(
            self.tree_cache,
            total_tokens=self.max_total_num_tokens,
            checkpoints=self._checkpoints,
            aside=self._aside,
            is_offline=self.is_offline,
            requeue=self._intake.take_back,
            free_rows=self.req_to_token_pool.available_size,
        )
        adapters = Adapters(
            self, aside=self._aside, memory=self._memory, is_offline=self.is_offline
        )
        self._admission = Admission(
            self,
            intake=self._intake,
            aside=self._aside,
            memory=self._memory,
            adapters=adapters,
            checkpoints=self._checkpoints,
            is_offline=self.is_offline,
        )

    def init_lora_drainer(self) -> None:
        super().init_lora_drainer()
        if self.lora_drainer is not None:
            self.lora_drainer = OnlineDrainer(self.lora_drainer, self.is_offline)

    def init_invariant_checker(self) -> None:
        super().init_invariant_checker()
        self.invariant_checker = with_parked_rows(self.invariant_checker, lambda: self._aside.reqs)

    def init_batch_result_processor(self) -> None:
        super().init_batch_result_processor()
        self.batch_result_processor = with_flat_hidden_states(self.batch_result_processor)

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
            self._intake.start_clock(req)
            super()._add_request_to_queue(req, is_retracted)
        elif is_retracted or req.retracted_stain:
            self._intake.take_back(req)
        else:
            self._intake.queue_offline(req)

    # ------------------------------------------------- the step: observe, plan, form

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> NextBatchPlan:
        self._aside.parked.drop_finished()
        view = self._observer.look(running_batch, last_batch)
        self._plan = plan = from_rank_zero(self.tp_group, lambda: self._budget.plan(view))
        rows_to_spare = plan.offline_decode_rows - view.offline_decoding.count
        running_batch = self._aside.parked.come_back(running_batch, rows_to_spare)
        formed = super().get_next_batch_to_run(running_batch, last_batch)
        self._observer.note_formed(formed.batch_to_run)
        self._accounts.step(formed.batch_to_run, view, plan)
        self._learning.started(formed.batch_to_run)
        return formed

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        self._admission.move_offline_chunk(self._plan)
        if self._live.now.holds_offline:
            self._memory.preempt_all(running_batch)
        if self._live.now.offline is OfflineWork.ENDS:
            self._intake.refuse_queued()
        theirs = super().get_new_batch_prefill
        return self._admission.form(running_batch, self._observer.view, self._plan, theirs)

    def get_prefill_adder_class(self) -> Callable[..., PrefillAdder]:
        return self._admission.adder_class(self._observer.view, self._plan)

    def update_running_batch(self, batch: ScheduleBatch) -> ScheduleBatch | None:
        self._aside.sit_out(batch, self._plan.offline_decode_rows)
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

    # ------------------------------------------------------------ the step: act

    def is_disable_overlap_for_batch(
        self, batch: ScheduleBatch | None, last_batch: ScheduleBatch | None
    ) -> bool:
        # Slices keep the event loop for as long as they run: what the last batch gave leaves first.
        something_leaves = batch is not None and bool(self.result_queue)
        if something_leaves and self._aside.slices.accepts(batch, fresh=self._plan.in_slices):
            return True
        return super().is_disable_overlap_for_batch(batch, last_batch)

    def run_batch(self, batch: ScheduleBatch, pp_proxy_tensors: Any = None) -> Any:
        if not self._aside.slices.accepts(batch, fresh=self._plan.in_slices):
            result = super().run_batch(batch, pp_proxy_tensors)
            self._learning.launched()
            return result
        return run_in_slices(
            self,
            self._aside.slices,
            batch,
            partial(super().run_batch, batch, pp_proxy_tensors),
            granted_s=self._plan.offline_slice_s,
            learning=self._learning,
        )

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        if result is SUSPENDED:
            self.maybe_send_health_check_signal()
            self._learning.finished()
            return
        self._aside.slices.note_result(batch)
        super().process_batch_result(batch, result)
        drafts = result.num_correct_drafts_per_req_cpu if batch.forward_mode.is_decode() else None
        self._observer.note_result(batch, drafts)
        self._learning.finished()
        # Nothing here that ranks see differently, such as arrivals: their trees must stay alike.
        tight = bool(self.waiting_queue or self._observer.view.online_prompts)
        self._checkpoints.after_result(batch, online_tight=tight)

    # ------------------------------------- everything else that looks at requests

    def _collect_inflight_batches(self) -> list[ScheduleBatch | None]:
        return [*super()._collect_inflight_batches(), self._aside.slices.suspended]

    def abort_request(self, recv_req: AbortReq) -> None:
        rid = None if recv_req.abort_all else recv_req.rid
        # Now they are queued requests like any other, and SGLang's own code aborts those.
        self.waiting_queue += self._intake.take_out(rid)
        with nullcontext() if rid is None else namesakes_spared(self, rid):
            super().abort_request(recv_req)
        self._intake.end_suspended()

    def pause_generation(self, recv_req: Any) -> None:
        super().pause_generation(recv_req)
        self._learning.forget()
        if recv_req.mode == "retract":
            self._memory.preempt_all_aside()

    def is_fully_idle(self, for_health_check: bool = False, ignore_waiting: bool = False) -> bool:
        if not super().is_fully_idle(for_health_check, ignore_waiting):
            return False
        if for_health_check:
            # Only a running batch answers a health check that was skipped.
            return True
        return not self._aside.reqs and (ignore_waiting or len(self._intake.queue) == 0)

    def flush_cache(self, empty_cache: bool = True) -> bool:
        flushed = super().flush_cache(empty_cache)
        if flushed:
            self._checkpoints.cache_emptied()
        return flushed

    def get_init_info(self) -> dict[str, Any]:
        return super().get_init_info() | {"conserve": True}

    def set_internal_state(self, recv_req: SetInternalStateReq) -> SetInternalStateReqOutput:
        return self._live.change(recv_req, super().set_internal_state)

    def get_internal_state(self, recv_req: Any) -> Any:
        if (ask := Ask.of_rid(recv_req.rid)) is not None:  # SGLang's own would take a while
            return GetInternalStateReqOutput(internal_state=self._status.answer(ask))
        output, state = super().get_internal_state(recv_req), self._accounts.state()
        output.internal_state["conserve"] = state | {"status": self._status.builtins(state)}
        return output
