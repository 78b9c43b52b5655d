"""Penalties of a resumed request: SGLang counts output tokens per batch, and forgets them.

A penalizer (frequency, presence, repetition, min_new_tokens) starts at nothing when a request is
prefilled. For one that comes back with output tokens that is wrong: it would repeat itself, or
stop too late. Here the counts are taken again from the tokens, before the batch runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from conserve_sgl.checkpoint.host import BatchedPenalizerOrchestrator, Req, ScheduleBatch

__all__ = ["restore_penalties"]


class _OneRow:
    """As much of a batch as an orchestrator looks at."""

    def __init__(self, req: Req, device: Any) -> None:
        self.reqs = [req]
        self.device = device


def restore_penalties(batch: ScheduleBatch, needs: Callable[[Req], bool], *, lagging: bool) -> None:
    """Count the output tokens of resumed requests again; changes the penalizers of `batch`.

    Args:
        batch: a prefill batch that has not run; rows that decode in it keep their counts.
        needs: whether this row was resumed.
        lagging: overlap scheduling, where a row counts the last token of its prompt first and is
            one token behind ever after.
    """
    orchestrator = batch.sampling_info.penalizer_orchestrator
    if not orchestrator.is_required:
        return
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    for row, req in enumerate(batch.reqs):
        if id(req) not in decoding and req.output_ids and needs(req):
            tokens = list(req.output_ids)
            if lagging:
                tokens = [req.origin_input_ids[-1], *tokens[:-1]]
            _set_row(orchestrator, row, req, tokens)


def _set_row(
    orchestrator: BatchedPenalizerOrchestrator, row: int, req: Req, tokens: list[int]
) -> None:
    one_row = _OneRow(req, orchestrator.device)  # the orchestrator keeps a weak reference
    alone = BatchedPenalizerOrchestrator(
        orchestrator.vocab_size, one_row, set(orchestrator.penalizers)
    )
    if not alone.is_required:
        return
    for token in torch.tensor(tokens, device=orchestrator.device).unsqueeze(1):
        alone.cumulate_output_tokens(token)
    for kind, penalizer in alone.penalizers.items():
        if penalizer.is_prepared():
            _copy_row(penalizer, orchestrator.penalizers[kind], row)


def _copy_row(source: Any, target: Any, row: int) -> None:
    """Every tensor of a penalizer has a row per request."""
    for name, values in vars(source).items():
        if isinstance(values, torch.Tensor):
            getattr(target, name)[row] = values[0]
