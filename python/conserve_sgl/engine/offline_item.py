"""What the OfflineQueue is told of SGLang's requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from conserve_sgl.policy import JobTag, OfflineItem, prefix_key

if TYPE_CHECKING:  # the tests of this file need no SGLang
    from conserve_sgl.engine.host import Req

__all__ = ["answer_tokens", "offline_item", "served_tokens"]

# Clients leave limits wide, and answers end long before them; what was expected too much is made
# good when the request is done.
_EXPECTED_OUTPUT_TOKENS = 1024


def offline_item(req: Req) -> OfflineItem:
    """The queue's record of a request that is new in the scheduler; takes the job's tag off it."""
    params = req.sampling_params
    tag, params.custom_params = JobTag.take_out(params.custom_params)
    tag = tag or JobTag(received_s=time.monotonic())
    limit = params.max_new_tokens
    output_tokens = (
        _EXPECTED_OUTPUT_TOKENS if limit is None else min(limit, _EXPECTED_OUTPUT_TOKENS)
    )
    return OfflineItem(
        rid=req.rid,
        tokens=max(len(req.origin_input_ids) + output_tokens, 1),
        arrived_s=tag.received_s,
        job=tag.job,
        deadline_s=tag.deadline_s,
        prefix=prefix_key(req.origin_input_ids, req.extra_key or ""),
        adapter=req.lora_id or "",
    )


def served_tokens(req: Req) -> int:
    """What a request that is done cost the engine: cached prompt tokens are free."""
    return len(req.origin_input_ids) - req.cached_tokens + answer_tokens(req)


def answer_tokens(req: Req) -> int:
    """Tokens of the answer so far. A step of speculative decoding may run past its end."""
    return len(req.output_ids) if req.finished_len is None else req.finished_len
