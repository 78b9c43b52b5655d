"""A step that runs in slices of layers (`slices.py`), within SGLang's scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import Protocol

from conserve_sgl.engine.host import GenerationBatchResult, Req, ScheduleBatch
from conserve_sgl.engine.learning import Learning
from conserve_sgl.engine.slices import SUSPENDED, LayerSlices

__all__ = ["run_in_slices"]


class _Host(Protocol):
    """What of SGLang's scheduler is read here, and, but for the first, changed."""

    running_batch: ScheduleBatch
    chunked_req: Req | None
    processed_tokens_counter: int
    _pending_chunked_abort_req: Req | None


def run_in_slices(
    host: _Host,
    slices: LayerSlices,
    batch: ScheduleBatch,
    run_batch: Callable[[], GenerationBatchResult],
    *,
    granted_s: float,
    learning: Learning,
) -> GenerationBatchResult:
    """Run `batch`, which `slices` accepted, as far as it may.

    Args:
        host: SGLang's scheduler.
        slices: run it.
        batch: fresh, or the suspended one.
        run_batch: SGLang's `run_batch` of it.
        granted_s: how long it may run while rows wait to decode; without any, it may at will.
        learning: is told whether a whole step ran.

    Returns:
        The result of `run_batch`, or `SUSPENDED`.
    """
    whole = batch is not slices.suspended
    until_s = time.monotonic() + (inf if host.running_batch.is_empty() else granted_s)
    result = slices.run(batch, run_batch, until_s=until_s)
    if whole and result is not SUSPENDED:
        learning.launched()
    else:
        learning.launched_in_part()
    if result is SUSPENDED:
        _leave_suspended(host, batch)
    elif (chunk := batch.chunked_req) is not None and chunk.to_finish is not None:
        host._pending_chunked_abort_req = chunk
    return result


def _leave_suspended(host: _Host, batch: ScheduleBatch) -> None:
    host.processed_tokens_counter -= batch.extend_num_tokens  # SGLang counts them every time
    if batch.chunked_req is not None:
        # SGLang would take the chunk's KV for computed, and could chunk no online prompt.
        host.chunked_req = None
