"""Methods of SGLang whose bodies, not just signatures, conserve relies on.

Our overrides run around these and lean on what they do, in which order, and on which attributes.
When one differs from 0.5.23, read it anew together with what the table names, and only then put the
hash of the failure's message into the table.
"""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler."
_ADDER = "sglang.srt.managers.schedule_policy:PrefillAdder."
_BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch."
_CHECKER = "sglang.srt.managers.scheduler_components.invariant_checker:SchedulerInvariantChecker."
_CORE = "sglang.srt.mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore."
_MAMBA = "sglang.srt.mem_cache.unified_cache.components.mamba:MambaComponent."
_RESULTS = (
    "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor."
)
_TREE = "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache."
_TOKENIZER = "sglang.srt.managers.tokenizer_manager:TokenizerManager."


class Relied(NamedTuple):
    """What stands in SGLang 0.5.23, and where to look when it stands there no longer."""

    method: str
    sha256: str
    reread: str


RELIED = [
    Relied(
        _SCHEDULER + "get_next_batch_to_run",
        "34f30fd4dfb13d74",
        "ConserveScheduler.get_next_batch_to_run, Observer.look and Admission.move_offline_chunk: "
        "a finished prefill is merged and the chunked request stashed before "
        "get_new_batch_prefill, and decode runs only when that gives no batch",
    ),
    Relied(
        _SCHEDULER + "get_new_batch_prefill",
        "a8b9a7a4fee3e50e",
        "Admission.form: waiting_queue holds offline candidates within",
    ),
    Relied(
        _SCHEDULER + "_get_new_batch_prefill_raw",
        "09e8cf03a4d0c1bb",
        "Admission.form and engine/adder.py: order of admission, "
        "batch_is_full, how the adder's verdicts end the loop, how chunked_req is set",
    ),
    Relied(
        _MAMBA + "prepare_for_caching_req",
        "3c3d5ac8e7e46b8f",
        "StateSlots.kept_len: of which position the state is that a checkpoint puts into the tree, "
        "and that it takes a slot, or ends the engine",
    ),
    Relied(
        _RESULTS + "_handle_finish_state_updated_req",
        "b22495dbb10d38f4",
        "StateSlots.settle and kept_len: which of two slots the next copy of a state goes to, and "
        "when the last one is taken note of",
    ),
    Relied(
        _RESULTS + "_mamba_prefix_cache_update",
        "b7398a981bfdc6f3",
        "StateSlots.settle: turns are taken by flipping, not by who was last",
    ),
    Relied(
        "sglang.srt.mem_cache.memory_pool:HybridReqToTokenPool.alloc",
        "60b048a1357479ef",
        "StateSlots.per_row and take_back: what a row takes, and that a slot which a request holds "
        "is kept",
    ),
    Relied(
        _SCHEDULER + "update_running_batch",
        "6962823239da9a89",
        "ConserveScheduler.update_running_batch: rows that sit out leave first, "
        "and KV is freed so that SGLang does not retract online rows",
    ),
    Relied(
        _SCHEDULER + "_add_request_to_queue",
        "056a60799b02ac47",
        "ConserveScheduler._add_request_to_queue: what an offline request goes without",
    ),
    Relied(
        _SCHEDULER + "_set_or_validate_priority",
        "920836f00dbc8196",
        "ConserveScheduler.is_offline: what SGLang makes of a missing priority",
    ),
    Relied(
        _SCHEDULER + "_release_aborted_request",
        "29bcfe53df66e3d4",
        "Intake._end",
    ),
    Relied(
        _SCHEDULER + "abort_request",
        "b16ca1103b1df7f5",
        "ConserveScheduler.abort_request: how requests in waiting_queue are matched and answered; "
        "engine/namesakes.py: where else it looks for requests",
    ),
    Relied(
        _SCHEDULER + "process_pending_chunked_abort",
        "62e3fce1240d07a4",
        "ConserveScheduler.abort_request and Admission.move_offline_chunk: an abort waits for "
        "chunked_req",
    ),
    Relied(
        _SCHEDULER + "stash_chunked_request",
        "b39124b41321009f",
        "Admission.move_offline_chunk: a chunk is put aside after it was stashed",
    ),
    Relied(
        _SCHEDULER + "can_schedule_lora_req",
        "2d821a0bbdae91c0",
        "engine/adapters.py: which adapters count, and what the drainer is asked",
    ),
    Relied(
        "sglang.srt.lora.lora_manager:LoRAManager.fetch_new_loras",
        "9b4202df6f2cecbf",
        "engine/adapters.py: all adapters of a batch are loaded before it runs, or it fails",
    ),
    Relied(
        _ADDER + "add_one_req_ignore_eos",
        "ff2cd7c2798ad318",
        "engine/adder.py, _now_fits: what it needs free, and that `req_states` is made if None",
    ),
    Relied(
        _TREE + "load_back",
        "40239d4f78e6af9d",
        "HostCopies.load_ahead: nodes are on the device and locked until the copy has ended",
    ),
    Relied(
        _TREE + "loading_check",
        "79f49c6855d1a23d",
        "HostCopies._is_loading: a copy leaves ongoing_load_back when all ranks have it",
    ),
    Relied(
        "sglang.srt.managers.cache_controller:HiCacheController.start_loading",
        "3120806593e5e17e",
        "HostCopies.fence: loads end in the order in which they started, and three may be on their "
        "way: ours, and one for each of two batches",
    ),
    Relied(
        _SCHEDULER + "event_loop_normal",
        "c328a45b821f18a0",
        "engine/slices.py: what the loop does with a batch and its result after run_batch",
    ),
    Relied(
        _SCHEDULER + "event_loop_overlap",
        "c093eb14e50c1ac6",
        "engine/slices.py and ConserveScheduler.is_disable_overlap_for_batch: a result is queued "
        "for every batch, and taken from the queue while there is a last batch",
    ),
    Relied(
        _SCHEDULER + "run_batch",
        "4e9bb4d5e649e2f1",
        "LayerSlices.run: it may be left in the model runner's forward and called again, with "
        "nothing done twice; it samples, publishes and relays after the forward",
    ),
    Relied(
        _SCHEDULER + "_forward_isolation",
        "1b3afb2200527f72",
        "LayerSlices.run: it restores the batch when the forward is left",
    ),
    Relied(
        _SCHEDULER + "process_batch_result",
        "726305f46a979a47",
        "ConserveScheduler.process_batch_result: what a suspended batch goes without",
    ),
    Relied(
        _SCHEDULER + "_collect_inflight_batches",
        "2baf58f0697a250a",
        "ConserveScheduler._collect_inflight_batches: who looks at these batches",
    ),
    Relied(
        "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
        "074f2a1c07948223",
        "LayerSlices.run: it makes a forward batch, calls the runner's forward once, and samples",
    ),
    Relied(
        "sglang.srt.model_executor.model_runner:ModelRunner.forward_split_prefill",
        "36287ab27d2162b4",
        "LayerSlices: split_index moves by split_forward_count layers, attention is planned at "
        "layer 0 or when it is asked for",
    ),
    Relied(
        "sglang.srt.managers.overlap_utils:resolve_forward_inputs",
        "961cfa7af7ccd2a6",
        "LayerSlices.run: called again for a batch that goes on, it changes nothing",
    ),
    Relied(
        _SCHEDULER + "pause_generation",
        "b5afa4cbaf6fbea9",
        "ConserveScheduler.pause_generation: what mode `retract` takes out of the engine",
    ),
    Relied(
        _SCHEDULER + "is_fully_idle",
        "de1b97c37c2842d2",
        "ConserveScheduler.is_fully_idle: what the flags leave out",
    ),
    Relied(
        _SCHEDULER + "init_ipc_channels",
        "8dee5ea23751f232",
        "ConserveScheduler.init_ipc_channels: recv_from_tokenizer is None off rank 0",
    ),
    Relied(
        _SCHEDULER + "init_schedule_policy",
        "91e50a99cc80f8f8",
        "ConserveScheduler.init_schedule_policy: it makes the policy anew, with these arguments",
    ),
    Relied(
        _SCHEDULER + "init_invariant_checker",
        "2a8bca7002092208",
        "ConserveScheduler.init_invariant_checker: who keeps a reference to the checker",
    ),
    Relied(
        _ADDER + "add_one_req",
        "11ea292b16f33cb6",
        "ConserveAdder.add_one_req and _offline_fits: how rem_chunk_tokens limits and is charged",
    ),
    Relied(
        _ADDER + "add_chunked_req",
        "af3ae7db76b5e8d2",
        "ConserveAdder.add_chunked_req: how rem_chunk_tokens limits and is charged",
    ),
    Relied(
        _ADDER + "_swa_new_tokens",
        "e3c89c4f72571380",
        "ConserveAdder._offline_fits: it is taken for the estimate of output tokens",
    ),
    Relied(
        _BATCH + "filter_batch",
        "17e9b543d3c8c16e",
        "engine/parking.py: which tensors and lists of a batch are cut",
    ),
    Relied(
        _BATCH + "merge_batch",
        "efcc96367ceacfa6",
        "engine/parking.py: which tensors and lists of two batches are joined",
    ),
    Relied(
        "sglang.srt.speculative.ngram_info:NgramVerifyInput.filter_batch",
        "56b5fc67cd9bd26b",
        "engine/parking.py: filtering replaces the tensors of a batch's spec_info, so that a "
        "shallow copy of it may be cut otherwise",
    ),
    Relied(
        "sglang.srt.speculative.ngram_info:NgramVerifyInput.merge_batch",
        "b72c13ffbdb32829",
        "engine/parking.py: what rows that come back bring along",
    ),
    Relied(
        "sglang.srt.managers.overlap_utils:FutureMap.resolve_seq_lens_cpu",
        "f7d9d6e12fc4040c",
        "engine/parking.py: with overlap scheduling the length of a row that sat out is found "
        "under its index, as are its last tokens",
    ),
    Relied(
        "sglang.srt.speculative.eagle_utils:eagle_prepare_for_decode",
        "a7054af5ba19aa6e",
        "ProfileLimits and _StepRunner._decode: KV is allocated for drafts beyond what is "
        "committed, and for those of the step after it",
    ),
    Relied(
        "sglang.srt.managers.scheduler_components.batch_result_processor:"
        "SchedulerBatchResultProcessor._resolve_spec_v2_tokens",
        "d79752842869a4d7",
        "Checkpointer and AcceptedLength: kv_committed_len counts what was accepted, and is "
        "seqlen - 1 once a result is handled; a retracted request takes no part in it",
    ),
    Relied(
        "sglang.srt.managers.schedule_batch:release_req",
        "e9a690b5c7084bb5",
        "Checkpointer.release: what of a preempted request is kept and reset",
    ),
    Relied(
        _TREE + "checkpoint_into_tree",
        "3a20fa5c0617352c",
        "Checkpointer._checkpoint: what moves to the tree, where the lock and cache_protected_len "
        "end up, and that an unfinished request may be inserted again and again",
    ),
    Relied(
        _CORE + "_inc_hit_count_and_check",
        "ee042b6f6227e923",
        "HostWrites: a node is written once it has write_through_threshold hits; the compiled core "
        "of SGLang does the same",
    ),
    Relied(
        _CORE + "_build_backup_kv_action",
        "f6914f4e94b5bd3e",
        "HostWrites: what is written takes the nodes above it along, so that a request that gives "
        "way is written whole",
    ),
    Relied(
        _TREE + "_execute_and_commit_kv_backup",
        "bbd39a400b845801",
        "Checkpointer._note_host_copy: a node whose copy finds no room is not backed up",
    ),
    Relied(
        "sglang.srt.mem_cache.common:release_kv_cache",
        "90e19434d1fa8c22",
        "Checkpointer.release: it frees what lies past cache_protected_len",
    ),
    Relied(
        _SCHEDULER + "process_batch_result",
        "726305f46a979a47",
        "ConserveScheduler.process_batch_result: backups queued after it wait for the next step",
    ),
    Relied(
        _BATCH + "cumulate_penalty_output_tokens",
        "dce2467c859a7049",
        "checkpoint/penalties.py: which token a row counts when it decodes",
    ),
    Relied(
        _BATCH + "prepare_for_extend",
        "e7ca2d0e335a570e",
        "engine/profiling.py: it allocates a row and KV and computes nothing",
    ),
    Relied(
        _BATCH + "mix_with_running",
        "6101dfc75b7c2564",
        "engine/step_meter.py, work_of: decode rows are the last of a mixed batch",
    ),
    Relied(
        "sglang.srt.managers.overlap_utils:resolve_forward_inputs",
        "961cfa7af7ccd2a6",
        "engine/profiling.py: prompt tokens come from prefill_input_ids_cpu, a decode row's from "
        "the FutureMap",
    ),
    Relied(
        "sglang.srt.mem_cache.common:release_kv_cache",
        "90e19434d1fa8c22",
        "engine/profiling.py: without a checkpoint nothing enters the radix tree",
    ),
    Relied(
        "sglang.srt.mem_cache.prefill_budget:SWAPrefillBudget.check_prefill",
        "9467efc26b341b65",
        "ConserveAdder._window_tokens: what a prompt must find free in the pool of windows",
    ),
    Relied(
        "sglang.srt.models.gemma3_causal:Gemma3ForCausalLM.forward_split_prefill",
        "08f3606ebf4c7af2",
        "engine/capabilities.py, WRONG_SPLITS: whether it hands the residual on by now",
    ),
    Relied(
        "sglang.srt.models.gemma2:Gemma2ForCausalLM.forward_split_prefill",
        "95a957dad9edcd4a",
        "engine/capabilities.py, WRONG_SPLITS: whether it scales embeddings as forward does by now",
    ),
    Relied(
        "sglang.srt.models.nanbeige:NanbeigeForCausalLM.forward_split_prefill",
        "6870c54e0e50ceae",
        "engine/capabilities.py, WRONG_SPLITS: whether it is there by now",
    ),
    Relied(
        "sglang.srt.models.teleflm:TeleFLMModel.forward",
        "a105b8ba579bfccb",
        "engine/capabilities.py, WRONG_SPLITS: the scale that LlamaForCausalLM's "
        "forward_split_prefill leaves out",
    ),
    Relied(
        _BATCH + "maybe_evict_swa",
        "d7f6ce9984583fe6",
        "engine/capabilities.py: what a window has passed is let go of in a decode step, and of "
        "what the tree holds only with SGLANG_OPT_RELEASE_PREFILL_SWA",
    ),
    Relied(
        "sglang.srt.mem_cache.common:free_swa_out_of_window_slots",
        "438b20d2778d5aed",
        "checkpoint/checkpointer.py: a checkpoint, made while a step is in flight, keeps all that "
        "the window of that step shows",
    ),
    Relied(
        _SCHEDULER + "event_loop_normal",
        "c328a45b821f18a0",
        "StepMeter: a step runs between two calls of get_next_batch_to_run",
    ),
    Relied(
        _SCHEDULER + "event_loop_overlap",
        "c093eb14e50c1ac6",
        "StepMeter: results are handled in the order of launches, one step behind",
    ),
    Relied(
        _CHECKER + "_requests_owning_rows",
        "c6c35aedd0ce6971",
        "engine/invariants.py: whose rows SGLang knows of",
    ),
    Relied(
        _TOKENIZER + "_init_req_state",
        "e864e33a0a232643",
        "Ingress.before_init_req_state: it runs once a request, ids are set, nothing is tokenized",
    ),
    Relied(
        _TOKENIZER + "_handle_batch_request",
        "3500d4b39e5b3787",
        "ingress/hooks.py, _rids_to_come: every sample of n > 1 comes through _init_req_state",
    ),
    Relied(
        "sglang.srt.plugins.hook_registry:HookRegistry.apply_hooks",
        "2b949d5a4187576c",
        "plugin.verify: a hook that failed is logged and missing in _patched",
    ),
    Relied(
        "sglang.srt.plugins:load_plugins",
        "cd2a423a31293f61",
        "plugin.register: it is called once a process, and apply_hooks looked up after it",
    ),
]


def fingerprint(function: Callable[..., Any]) -> str:
    """The first half of the sha256 of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


@pytest.mark.parametrize("relied", RELIED, ids=lambda relied: relied.method.partition(":")[2])
def test_the_body_is_the_one_that_was_read(relied):
    found = fingerprint(pkgutil.resolve_name(relied.method))
    assert found == relied.sha256, (
        f"{relied.method} is not what it was in 0.5.23 (now {found}). Re-read it, and then: "
        f"{relied.reread}"
    )
