"""Every private SGLang name that the engine half uses, in one place.

`tests/contract` pins their signatures; nothing else in this package imports them from SGLang.
"""

from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import (
    AbortReq,
    GetInternalStateReqOutput,
    SetInternalStateReq,
    SetInternalStateReqOutput,
)
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder, SchedulePolicy
from sglang.srt.managers.scheduler import Scheduler, _make_abort_req
from sglang.srt.managers.scheduler_components.batch_result_processor import (
    SchedulerBatchResultProcessor,
)
from sglang.srt.managers.scheduler_components.invariant_checker import SchedulerInvariantChecker
from sglang.srt.managers.utils import GenerationBatchResult, is_health_check_generate_req
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.prefill_budget import SWAPrefillBudget
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import (
    get_exec,
    get_lora,
    get_schedule,
    get_spec,
    max_speculative_num_draft_tokens,
)
from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.common import DynamicGradMode, broadcast_pyobj, get_device_name
from sglang.version import __version__ as sglang_version

__all__ = [
    "AbortReq",
    "AddReqResult",
    "BatchedPenalizerOrchestrator",
    "DynamicGradMode",
    "ForwardBatch",
    "ForwardMode",
    "GenerationBatchResult",
    "GetInternalStateReqOutput",
    "NextBatchPlan",
    "PrefillAdder",
    "Req",
    "SWAPrefillBudget",
    "SamplingParams",
    "ScheduleBatch",
    "SchedulePolicy",
    "Scheduler",
    "SchedulerBatchResultProcessor",
    "SchedulerInvariantChecker",
    "SetInternalStateReq",
    "SetInternalStateReqOutput",
    "_make_abort_req",
    "broadcast_pyobj",
    "current_platform",
    "envs",
    "get_device_name",
    "get_exec",
    "get_lora",
    "get_schedule",
    "get_spec",
    "is_health_check_generate_req",
    "max_speculative_num_draft_tokens",
    "release_kv_cache",
    "sglang_version",
]
