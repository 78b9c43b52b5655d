"""Sampling on an emulated device: the model has said which tokens, whatever was asked for.

Penalties, biases, grammars and temperatures change nothing. A logprob that was asked for is 0:
every token is certain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

__all__ = ["install", "sample"]


def install() -> None:
    """Stand for `ModelRunner.sample` in this process; call once its module is imported."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    ModelRunner.sample = sample


def sample(
    runner: Any,  # noqa: ARG001
    logits_output: LogitsProcessorOutput,
    forward_batch: ForwardBatch,
) -> torch.Tensor:
    """The tokens that the model put in the place of logits, [requests]."""
    tokens = logits_output.next_token_logits[:, 0]
    if forward_batch.return_logprob:
        _add_logprobs(logits_output, forward_batch, tokens)
    return tokens


def _add_logprobs(
    output: LogitsProcessorOutput, forward_batch: ForwardBatch, tokens: torch.Tensor
) -> None:
    """SGLang takes them for granted where a request asked, and ends if they are not there."""
    tops = forward_batch.top_logprobs_nums or [0] * len(tokens)
    asked = [ids or [] for ids in forward_batch.token_ids_logprobs or [None] * len(tokens)]
    output.next_token_logprobs = torch.zeros(len(tokens))
    output.next_token_top_logprobs_val = [torch.zeros(top) for top in tops]
    output.next_token_top_logprobs_idx = [
        token.repeat(top) for token, top in zip(tokens, tops, strict=True)
    ]
    output.next_token_token_ids_logprobs_val = [torch.zeros(len(ids)) for ids in asked]
    output.next_token_token_ids_logprobs_idx = asked
    if forward_batch.forward_mode.is_decode_or_idle():
        return
    lengths = zip(
        forward_batch.extend_seq_lens_cpu, forward_batch.extend_logprob_start_lens_cpu, strict=True
    )
    counts = [new - start for new, start in lengths]
    output.input_token_logprobs = torch.zeros(sum(counts))
    output.input_top_logprobs_val = [[[0.0] * t] * n for n, t in zip(counts, tops, strict=True)]
    output.input_top_logprobs_idx = [[[0] * t] * n for n, t in zip(counts, tops, strict=True)]
    output.input_token_ids_logprobs_val = [
        [[0.0] * len(i)] * n for n, i in zip(counts, asked, strict=True)
    ]
    output.input_token_ids_logprobs_idx = [[i] * n for n, i in zip(counts, asked, strict=True)]
