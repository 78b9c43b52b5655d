"""What the OfflineQueue is told of SGLang's requests."""

from __future__ import annotations

import time

from conserve_sgl.engine.host import Req
from conserve_sgl.policy import OfflineItem, prefix_key

__all__ = ["offline_item", "served_tokens"]

# Clients leave limits wide, and answers end long before them; what was expected too much is made
# good when the request is done.
_EXPECTED_OUTPUT_TOKENS = 1024


def offline_item(req: Req) -> OfflineItem:
    """The queue's record of a request that is new in the scheduler."""
    limit = req.sampling_params.max_new_tokens
    output_tokens = (
        _EXPECTED_OUTPUT_TOKENS if limit is None else min(limit, _EXPECTED_OUTPUT_TOKENS)
    )
    return OfflineItem(
        rid=req.rid,
        tokens=len(req.origin_input_ids) + max(output_tokens, 1),
        arrived_s=time.monotonic(),
        prefix=prefix_key(req.origin_input_ids, req.extra_key or ""),
    )


def served_tokens(req: Req) -> int:
    """What a request that is done cost the engine: cached prompt tokens are free."""
    return len(req.origin_input_ids) - req.cached_tokens + len(req.output_ids)
