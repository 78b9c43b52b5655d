"""The signatures in SGLang that conserve overrides, calls or hooks.

A change here means that a call of ours, or a call into ours, may no longer fit. Read the new
function, adapt what uses it, and only then the table. Parameters and defaults are compared, not
annotations: those change without changing anything.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import conserve_sgl
from conserve_sgl.plugin import HOOK_TARGETS

PACKAGE = Path(conserve_sgl.__file__).parent

SIGNATURES_BY_MODULE = {
    "sglang.srt.managers.scheduler": {
        "Scheduler.init_ipc_channels": "(self, port_args)",
        "Scheduler.init_running_status": "(self)",
        "Scheduler.init_schedule_policy": "(self)",
        "Scheduler.init_lora_drainer": "(self)",
        "Scheduler.init_invariant_checker": "(self)",
        "Scheduler.init_batch_result_processor": "(self)",
        "Scheduler.collect_inflight_reqs": "(self)",
        "Scheduler.ingest_requests": "(self, stop_at_pause=False)",
        "Scheduler._add_request_to_queue": "(self, req, is_retracted=False)",
        "Scheduler._release_aborted_request": "(self, req)",
        "Scheduler.send_abort_output": "(self, abort_req, req)",
        "Scheduler.get_next_batch_to_run": "(self, running_batch, last_batch)",
        "Scheduler.get_prefill_adder_class": "(self)",
        "Scheduler.get_new_batch_prefill": "(self, running_batch)",
        "Scheduler.update_running_batch": "(self, batch)",
        "Scheduler.is_disable_overlap_for_batch": "(self, batch, last_batch)",
        "Scheduler.run_batch": "(self, batch, pp_proxy_tensors=None)",
        "Scheduler.process_batch_result": "(self, batch, result)",
        "Scheduler.maybe_send_health_check_signal": "(self)",
        "Scheduler._collect_inflight_batches": "(self)",
        "Scheduler.abort_request": "(self, recv_req)",
        "Scheduler.pause_generation": "(self, recv_req)",
        "Scheduler.flush_cache": "(self, empty_cache=True)",
        "Scheduler.is_fully_idle": "(self, for_health_check=False, ignore_waiting=False)",
        "Scheduler.get_init_info": "(self)",
        "Scheduler.get_internal_state": "(self, recv_req)",
        "Scheduler.set_internal_state": "(self, recv_req)",
        "Scheduler": "(server_args, port_args)",
        "_make_abort_req": "(req, finished_reason=None)",
    },
    "sglang.srt.managers.scheduler_components.batch_result_processor": {
        "SchedulerBatchResultProcessor._append_prefill_hidden_states": (
            "(self, *, req, logits_output, hidden_state_offset, capture_hidden_mode, "
            "extend_input_len, store=True)"
        ),
    },
    "sglang.srt.managers.schedule_batch": {
        "release_req": (
            "(*, req, remaing_req_count, req_to_token_pool, token_to_kv_pool_allocator, "
            "tree_cache, hisparse_coordinator, offload_kv=True)"
        ),
        "NextBatchPlan": "(batch_to_run, running_batch)",
        "ScheduleBatch.filter_batch": "(self, reqs_to_exclude=None, keep_indices=None)",
        "ScheduleBatch.merge_batch": "(self, other)",
        "ScheduleBatch.is_empty": "(self)",
        "ScheduleBatch.check_decode_mem": "(self, selected_indices=None)",
        "ScheduleBatch.init_new": (
            "(reqs, req_to_token_pool, token_to_kv_pool_allocator, tree_cache, model_config, "
            "enable_overlap, spec_algorithm, chunked_req=None, dllm_config=None)"
        ),
        "ScheduleBatch.prepare_for_extend": "(self)",
        "ScheduleBatch.prepare_for_decode": "(self)",
        "ScheduleBatch.mix_with_running": "(self, running_batch)",
        "Req.finished": "(self)",
        "Req.init_next_round_input": "(self, tree_cache=None, cow_mamba=None)",
        "Req.refresh_fill_ids": "(self)",
        "Req.owned_kv_len": "(self)",
    },
    "sglang.srt.managers.overlap_utils": {
        "FutureMap.stash_bonus_tokens": "(self, indices, bonus_tokens)",
    },
    "sglang.srt.mem_cache.common": {
        "release_kv_cache": "(req, tree_cache, *, checkpoint)",
    },
    "sglang.srt.mem_cache.base_prefix_cache": {
        "BasePrefixCache.lock": "(self, node)",
    },
    "sglang.srt.utils.common": {
        "broadcast_pyobj": "(data, rank, dist_group=None, src=0, force_cpu_device=True)",
        "get_device_name": "(device_id=0)",
        "DynamicGradMode": "(mode_or_orig_func=None)",
    },
    "sglang.srt.mem_cache.unified_radix_cache": {
        "UnifiedRadixCache.checkpoint": "(self, req, *, up_to, **kwargs)",
        "UnifiedRadixCache.insert": "(self, params)",
        "UnifiedRadixCache.supports_prefix_sharing": "(self)",
        "UnifiedRadixCache.evictable_size": "(self)",
        "UnifiedRadixCache.full_evictable_size": "(self)",
        "UnifiedRadixCache.swa_evictable_size": "(self)",
        "UnifiedRadixCache.supports_swa": "(self)",
        "UnifiedRadixCache.mamba_evictable_size": "(self)",
        "UnifiedRadixCache.supports_mamba": "(self)",
        "UnifiedRadixCache.inc_host_lock_ref": "(self, node_id)",
        "UnifiedRadixCache.dec_host_lock_ref": "(self, node_id, params)",
        "UnifiedRadixCache.load_back": "(self, node_id, mem_quota=None, req=None)",
        "UnifiedRadixCache.ready_to_load_host_cache": "(self)",
        "UnifiedRadixCache.is_backuped": "(self, node_id)",
        "UnifiedRadixCache.path_device_indices": "(self, node)",
    },
    "sglang.srt.mem_cache.allocator.swa": {
        "SWATokenToKVPoolAllocator.full_available_size": "(self)",
        "SWATokenToKVPoolAllocator.swa_available_size": "(self)",
        "is_swa_req_ring": "(allocator)",
    },
    "sglang.srt.mem_cache.allocator.mamba": {
        "MambaSlotAllocator.available_size": "(self)",
        "MambaSlotAllocator.free": "(self, free_index)",
    },
    "sglang.srt.mem_cache.prefill_budget": {
        "SWAPrefillBudget.swa_tokens": (
            "(self, extend_input_len, max_new_tokens, *, chunk_limit=None, swa_host_hit_length=0)"
        ),
    },
    "sglang.srt.mem_cache.swa_memory_pool": {
        "SWAKVPool.translate_loc_from_full_to_swa": "(self, kv_indices)",
    },
    "sglang.srt.managers.schedule_policy": {
        "SchedulePolicy": (
            "(policy, tree_cache, enable_hierarchical_cache, enable_priority_scheduling, "
            "schedule_low_priority_values_first)"
        ),
        "SchedulePolicy.calc_priority": (
            "(self, waiting_queue, running_batch=None, processed_tokens=0)"
        ),
        "PrefillAdder": (
            "(page_size, tree_cache, token_to_kv_pool_allocator, running_batch, "
            "new_token_ratio, rem_input_tokens, rem_chunk_tokens, num_mixed_decode_tokens=0, "
            "priority_scheduling_preemption_threshold=0, max_prefill_bs=0, "
            "max_running_requests=None, prefill_max_requests=None, "
            "prefill_delayer_single_pass=None, dllm_config=None, waiting_queue_len=0, "
            "prefill_tile_block_m=64)"
        ),
        "PrefillAdder.add_one_req": "(self, req, has_chunked_req, truncation_align_size)",
        "PrefillAdder.add_chunked_req": "(self, req)",
        "PrefillAdder._swa_new_tokens": "(self, req)",
        "PrefillAdder.ceil_paged_tokens": "(self, tokens)",
    },
    "sglang.srt.managers.scheduler_components.invariant_checker": {
        "SchedulerInvariantChecker": (
            "(*, is_hybrid_swa, is_hybrid_ssm, disaggregation_mode, page_size, "
            "full_tokens_per_layer, swa_tokens_per_layer, max_total_num_tokens, tree_cache, "
            "token_to_kv_pool_allocator, req_to_token_pool, pool_stats_observer, "
            "get_last_batch, get_running_batch, scheduler_stage_metrics, "
            "get_chunked_req=<lambda>, count_req_pool_leak_warnings=0, "
            "count_memory_leak_warnings=0, recent_busy_msgs=<factory>)"
        ),
        "SchedulerInvariantChecker._requests_owning_rows": "(self)",
    },
    "sglang.srt.sampling.penaltylib.orchestrator": {
        "BatchedPenalizerOrchestrator": "(vocab_size, batch, penalizers)",
        "BatchedPenalizerOrchestrator.cumulate_output_tokens": "(self, output_ids)",
        "_BatchedPenalizer.is_prepared": "(self)",
    },
    "sglang.srt.runtime_context": {
        "mamba_track_grid": "(tree_page)",
        "get_exec": "()",
        "get_schedule": "()",
        "get_serving": "()",
    },
    "sglang.srt.managers.tokenizer_manager": {
        "SignalHandler.sigterm_handler": "(self, signum=None, frame=None)",
        "TokenizerManager.set_internal_state": "(self, obj)",
        "TokenizerManager.init_ipc_channels": "(self, port_args)",
        "TokenizerManager._init_req_state": "(self, obj, request=None)",
        "TokenizerManager._create_tokenized_object": (
            "(self, obj, input_text, input_ids, input_embeds=None, mm_inputs=None, "
            "token_type_ids=None)"
        ),
    },
    "sglang.srt.lora.lora_drainer": {
        "LoRADrainer.update_draining_state": "(self, waiting_queue, running_reqs)",
        "LoRADrainer.can_schedule": "(self, req)",
    },
    "sglang.srt.lora.lora_manager": {
        "LoRAManager.validate_lora_batch": "(self, lora_ids)",
    },
    "sglang.srt.model_executor.model_runner": {
        "ModelRunner.forward": (
            "(self, forward_batch, skip_attn_backend_init=None, pp_proxy_tensors=None, "
            "reinit_attn_backend=False, split_forward_count=1)"
        ),
    },
    "sglang.srt.managers.cache_controller": {
        "LayerDoneCounter.wait_until": "(self, threshold)",
    },
    "sglang.srt.managers.io_struct": {
        "GenerateReqInput._handle_parallel_sampling": "(self)",
    },
    "sglang.srt.managers.utils": {
        "is_health_check_generate_req": "(recv_req)",
    },
    "sglang.srt.entrypoints.engine": {
        "Engine._launch_subprocesses": (
            "(server_args, init_tokenizer_manager_func, run_scheduler_process_func, "
            "run_detokenizer_process_func, port_args=None, placement_group=None)"
        ),
    },
    "sglang.srt.entrypoints.http_server": {
        "_setup_and_run_http_server": (
            "(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, "
            "subprocess_watchdog, execute_warmup_func=_execute_server_warmup, "
            "launch_callback=None)"
        ),
        "app.build_middleware_stack": "()",
    },
    "sglang.srt.plugins": {
        "load_plugins": "()",
    },
    "sglang.srt.plugins.hook_registry": {
        "HookRegistry.register": (
            "(target, hook, hook_type=<HookType.AFTER: 'after'>, *, source=None)"
        ),
        "HookRegistry.apply_hooks": "()",
    },
    "sglang.srt.server_args": {
        "prepare_server_args": "(argv)",
    },
    "sglang.srt.arg_groups.choices": {
        "add_attention_backend_choices": "(iterable, /)",
    },
    "sglang.srt.arg_groups.model_override_base": {
        "attention_backends_of": "(cfg)",
        "model_config_of": "(server_args)",
    },
    "sglang.srt.arg_groups.overrides": {
        "declare_resolution": "(server_args, source, **fields)",
        "resolving_view": "(server_args)",
    },
    "sglang.srt.arg_groups.resolution_hooks": {
        "register_resolution_hook": "(name)",
    },
    "sglang.srt.model_executor.cuda_graph_config": {
        "with_phase": "(config, phase, **changes)",
    },
    "sglang.srt.layers.attention.attention_registry": {
        "register_attention_backend": "(name)",
    },
    "sglang.srt.layers.attention.torch_native_backend": {
        "TorchNativeAttnBackend": "(model_runner)",
        "TorchNativeAttnBackend.init_forward_metadata": "(self, forward_batch)",
        "TorchNativeAttnBackend.forward_extend": (
            "(self, q, k, v, layer, forward_batch, save_kv_cache=True)"
        ),
        "TorchNativeAttnBackend.forward_decode": (
            "(self, q, k, v, layer, forward_batch, save_kv_cache=True)"
        ),
        "TorchNativeAttnBackend._run_sdpa_forward_extend": (
            "(self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, "
            "extend_prefix_lens, extend_seq_lens, encoder_lens=None, scaling=None, "
            "enable_gqa=False, causal=False, is_cross_attn=False, sliding_window_size=None)"
        ),
        "TorchNativeAttnBackend._run_sdpa_forward_decode": (
            "(self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, "
            "encoder_lens=None, scaling=None, enable_gqa=False, causal=False, "
            "is_cross_attn=False, sliding_window_size=None)"
        ),
    },
    "sglang.srt.platforms.interface": {
        "SRTPlatform.get_default_attention_backend": "(self)",
        "SRTPlatform.apply_server_args_defaults": "(self, server_args)",
        "SRTPlatform.init_backend": "(self)",
        "SRTPlatform.post_load_model": "(self, model)",
        "SRTPlatform.get_device": "(self, device_id=0)",
        "SRTPlatform.get_compile_backend": "(self, mode=None)",
    },
}
SIGNATURES = {
    f"{module}:{name}": signature
    for module, functions in SIGNATURES_BY_MODULE.items()
    for name, signature in functions.items()
}


def resolve(name: str) -> Any:
    return pkgutil.resolve_name(name)


class _AsIs:
    """A default as it reads in source: functions by their names, which have no address."""

    def __init__(self, value: Any) -> None:
        self._text = value.__name__ if callable(value) else repr(value)

    def __repr__(self) -> str:
        return self._text


def plain_signature(function: Callable[..., Any]) -> str:
    """The signature without annotations."""
    empty = inspect.Parameter.empty
    signature = inspect.signature(function)
    plain = [
        p.replace(annotation=empty, default=empty if p.default is empty else _AsIs(p.default))
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=plain, return_annotation=empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signature_is_the_one_that_conserve_was_written_for(name):
    assert plain_signature(resolve(name)) == SIGNATURES[name], (
        f"{name} has changed: re-read it, then what calls or overrides it in conserve_sgl"
    )


@pytest.mark.parametrize("target", HOOK_TARGETS)
def test_every_hook_target_is_there(target):
    module, _, attribute = target.rpartition(".")
    assert callable(getattr(resolve(module), attribute))


def test_every_hooked_function_is_in_the_table():
    functions = {name.replace(":", ".") for name in SIGNATURES}
    classes = {name.rpartition(".")[0] for name in functions}
    assert set(HOOK_TARGETS) <= functions | classes


@pytest.mark.parametrize("part", ["engine", "checkpoint"])
def test_every_name_that_is_taken_from_sglang_is_there(part):
    host = resolve(f"conserve_sgl.{part}.host")
    assert all(getattr(host, name) is not None for name in host.__all__)


# What is overridden is found in our own sources, so that a new override cannot be forgotten.

OVERRIDERS = {
    ("engine/scheduler.py", "ConserveScheduler"): "sglang.srt.managers.scheduler:Scheduler",
    ("engine/waiting_order.py", "OnlineFirst"): (
        "sglang.srt.managers.schedule_policy:SchedulePolicy"
    ),
    ("engine/adder.py", "ConserveAdder"): "sglang.srt.managers.schedule_policy:PrefillAdder",
    ("engine/hidden_states.py", "_Processor"): (
        "sglang.srt.managers.scheduler_components.batch_result_processor"
        ":SchedulerBatchResultProcessor"
    ),
    ("engine/invariants.py", "_Checker"): (
        "sglang.srt.managers.scheduler_components.invariant_checker:SchedulerInvariantChecker"
    ),
}
OVERRIDER_IDS = [name for _file, name in OVERRIDERS]


def class_in(file: str, name: str) -> ast.ClassDef:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    (found,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)
    return found


def uses_of_self(node: ast.ClassDef, context: type[ast.expr_context]) -> set[str]:
    """The names X of `self.X` that are read, or that are assigned, in a class."""
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, context)
        and isinstance(n.value, ast.Name)
        and n.value.id == "self"
    }


@cache
def attributes_of(host_class: type) -> set[str]:
    """The names that an instance has: of the classes, and assigned in their methods."""
    names = set(dir(host_class))
    for base in host_class.__mro__:
        if not base.__module__.startswith("sglang."):
            continue
        names |= set(inspect.get_annotations(base))
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        names |= uses_of_self(node, ast.Store)
    return names


@pytest.mark.parametrize(("ours", "theirs"), OVERRIDERS.items(), ids=OVERRIDER_IDS)
def test_every_method_that_is_overridden_is_in_the_table(ours, theirs):
    defined = {n.name for n in class_in(*ours).body if isinstance(n, ast.FunctionDef)}
    overridden = {name for name in defined if name in dir(resolve(theirs))} - {"__init__"}
    assert overridden, "a subclass that overrides nothing"
    assert {f"{theirs}.{name}" for name in overridden} <= set(SIGNATURES)


@pytest.mark.parametrize(("ours", "theirs"), OVERRIDERS.items(), ids=OVERRIDER_IDS)
def test_every_attribute_of_the_host_that_is_read_is_there(ours, theirs):
    node = class_in(*ours)
    own = uses_of_self(node, ast.Store) | {
        n.name for n in node.body if isinstance(n, ast.FunctionDef)
    }
    own |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    missing = uses_of_self(node, ast.Load) - own - attributes_of(resolve(theirs))
    assert not missing


@pytest.mark.parametrize(("ours", "theirs"), OVERRIDERS.items(), ids=OVERRIDER_IDS)
def test_no_attribute_of_ours_has_a_name_of_the_host_s_by_chance(ours, theirs):
    taken_on_purpose = {"policy", "invariant_checker", "batch_result_processor", "waiting_queue"}
    taken_on_purpose |= {"rem_chunk_tokens", "req_states", "lora_drainer"}
    assigned = uses_of_self(class_in(*ours), ast.Store)
    assert assigned & attributes_of(resolve(theirs)) <= taken_on_purpose


@pytest.mark.parametrize("part", ["adapters", "admission", "observe", "sliced_step"])
def test_the_scheduler_has_what_parts_of_ours_read_and_change_of_it(part):
    file = f"engine/{part}.py"
    fields = {n.target.id for n in class_in(file, "_Host").body if isinstance(n, ast.AnnAssign)}
    used = {
        n.attr
        for n in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
        if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("host", "self._host")
    }
    assert used == fields
    assert fields <= attributes_of(resolve("sglang.srt.managers.scheduler:Scheduler"))


REQUEST_ATTRIBUTES = (
    "beam_group",
    "extend_end",
    "finished",
    "finished_len",
    "full_untruncated_fill_ids",
    "host_hit_length",
    "kv",
    "last_node",
    "lock",
    "lora_id",
    "origin_input_ids",
    "output_ids",
    "prefix_len",
    "priority",
    "retracted_stain",
    "rid",
    "seqlen",
    "skip_radix_cache_insert",
    "time_stats",
    "to_finish",
)


def test_a_request_has_what_is_read_of_it():
    req = resolve("sglang.srt.managers.schedule_batch:Req")
    assert set(REQUEST_ATTRIBUTES) <= attributes_of(req)


@pytest.mark.parametrize(
    ("owner", "attributes"),
    [
        (
            "sglang.srt.managers.schedule_batch:ReqKvInfo",
            {"holds_kv", "req_pool_idx", "cache_protected_len", "kv_committed_len"},
        ),
        ("sglang.srt.managers.schedule_batch:ReqKvInfo", {"kv_allocated_len"}),
        ("sglang.srt.managers.schedule_batch:ScheduleBatch", {"decoding_reqs", "spec_info"}),
        (
            "sglang.srt.managers.utils:GenerationBatchResult",
            {"accept_lens", "new_seq_lens", "next_draft_input", "num_correct_drafts_per_req_cpu"}
            | {"speculative_num_draft_tokens"},
        ),
        (
            "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache",
            {"buffer_pipeline", "cache_controller", "is_write_back", "page_size"},
        ),
        (
            "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache",
            {"req_to_token_pool", "token_to_kv_pool_allocator", "write_through_threshold"},
        ),
        (
            "sglang.srt.managers.cache_controller:HiCacheController",
            {"write_queue", "ack_write_queue"},
        ),
        ("sglang.srt.managers.cache_controller:HiCacheAck", {"num_tokens"}),
        ("sglang.srt.managers.cache_controller:CacheOperation", {"device_indices"}),
        (
            "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
            {"get_kv_size_bytes", "page_size", "size"},
        ),
        (
            "sglang.srt.mem_cache.memory_pool:MLATokenToKVPool",
            {"get_kv_size_bytes", "page_size", "size"},
        ),
        ("sglang.srt.managers.schedule_batch:ScheduleBatch", {"batch_is_full", "reqs"}),
        ("sglang.srt.managers.schedule_batch:ScheduleBatch", {"forward_mode", "sampling_info"}),
        (
            "sglang.srt.managers.schedule_batch:ScheduleBatch",
            {"decoding_reqs", "extend_lens", "prefix_lens", "seq_lens_cpu"}
            | {"device", "prefill_input_ids_cpu", "req_pool_indices"},
        ),
        (
            "sglang.srt.managers.scheduler:Scheduler",
            {"_sched_idled", "chunked_prefill_size", "device", "device_module", "enable_overlap"}
            | {"forward_ct", "future_map", "max_req_input_len"}
            | {"max_running_requests", "model_config", "processed_tokens_counter"}
            | {
                "req_to_token_pool",
                "schedule_stream",
                "spec_algorithm",
                "token_to_kv_pool_allocator",
            }
            | {"tp_group", "tp_size", "tp_worker", "tree_cache"},
        ),
        (
            "sglang.srt.model_executor.model_runner:ModelRunner",
            {"decode_attention_backend_str", "gpu_id", "kv_cache_dtype"}
            | {"prefill_attention_backend_str"},
        ),
        (
            "sglang.srt.configs.model_config:ModelConfig",
            {"context_len", "dtype", "hf_config", "model_path", "num_hidden_layers"}
            | {"quantization", "vocab_size"},
        ),
        (
            "sglang.srt.distributed.parallel_state:GroupCoordinator",
            {"cpu_group", "first_rank", "is_first_rank", "rank", "world_size"},
        ),
        (
            "sglang.srt.managers.schedule_batch:ScheduleBatch",
            {"chunked_req", "extend_num_tokens", "hicache_consumer_index", "launch_ts"},
        ),
        (
            "sglang.srt.managers.schedule_batch:ScheduleBatch",
            {"input_embeds", "multimodal_inputs", "replace_embeds", "return_hidden_states"},
        ),
        (
            "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
            {"forward_mode", "split_index"},
        ),
        ("sglang.srt.model_executor.forward_batch_info:ForwardMode", {"EXTEND", "SPLIT_PREFILL"}),
        (
            "sglang.srt.model_executor.model_runner:ModelRunner",
            {"device", "lora_manager", "model", "model_config", "server_args"},
        ),
        ("sglang.srt.server_args:ServerArgs", {"enable_return_routed_experts"}),
        ("sglang.srt.managers.tp_worker:TpModelWorker", {"hicache_layer_transfer_counter"}),
        ("sglang.srt.managers.cache_controller:LayerDoneCounter", {"num_layers"}),
        (
            "sglang.srt.sampling.penaltylib.orchestrator:BatchedPenalizerOrchestrator",
            {"is_required", "penalizers", "vocab_size"},
        ),
        ("sglang.srt.managers.schedule_policy:AddReqResult", {"NO_TOKEN", "OTHER"}),
        ("sglang.srt.plugins.hook_registry:HookRegistry", {"_hooks", "_patched"}),
        ("sglang.srt.plugins.hook_registry:HookType", {"REPLACE", "BEFORE", "AFTER"}),
        ("sglang.srt.managers.io_struct:AbortReq", {"abort_all", "rid"}),
        ("sglang.srt.server_args:PortArgs", {"instance_id"}),
    ],
)
def test_a_class_has_what_is_read_of_it(owner, attributes):
    assert attributes <= attributes_of(resolve(owner))
