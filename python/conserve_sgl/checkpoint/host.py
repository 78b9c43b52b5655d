"""Every private SGLang name that checkpoints use, in one place; `tests/contract` pins them."""

from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch, release_req
from sglang.srt.mem_cache.allocator.swa import is_swa_req_ring
from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams, InsertParams, InsertResult
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import mamba_track_grid
from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator

__all__ = [
    "BatchedPenalizerOrchestrator",
    "DecLockRefParams",
    "HiCacheController",
    "InsertParams",
    "InsertResult",
    "NodeId",
    "Req",
    "ScheduleBatch",
    "UnifiedRadixCache",
    "is_swa_req_ring",
    "mamba_track_grid",
    "release_req",
]
