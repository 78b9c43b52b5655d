"""Every private SGLang name that the engine half uses, in one place.

`tests/contract` pins their signatures; nothing else in this package imports them from SGLang.
"""

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch, release_req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder, SchedulePolicy
from sglang.srt.managers.scheduler import Scheduler, _make_abort_req
from sglang.srt.managers.scheduler_components.invariant_checker import SchedulerInvariantChecker
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator
from sglang.srt.utils import broadcast_pyobj

__all__ = [
    "AbortReq",
    "AddReqResult",
    "BatchedPenalizerOrchestrator",
    "NextBatchPlan",
    "PrefillAdder",
    "Req",
    "ScheduleBatch",
    "SchedulePolicy",
    "Scheduler",
    "SchedulerInvariantChecker",
    "_make_abort_req",
    "broadcast_pyobj",
    "get_parallel",
    "get_schedule",
    "release_req",
]
