"""Every private SGLang name that checkpoints use, in one place; `tests/contract` pins them."""

from sglang.srt.managers.schedule_batch import Req, release_req
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_serving

__all__ = ["Req", "UnifiedRadixCache", "get_serving", "release_req"]
