"""The penalizers of a resumed row count what they had counted; SGLang's own penalizers."""

from __future__ import annotations

import warnings
from array import array
from types import SimpleNamespace

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sglang.srt.sampling.penaltylib import (
        BatchedFrequencyPenalizer,
        BatchedMinNewTokensPenalizer,
        BatchedPresencePenalizer,
        BatchedRepetitionPenalizer,
    )

    from conserve_sgl.checkpoint.host import BatchedPenalizerOrchestrator
    from conserve_sgl.checkpoint.penalties import restore_penalties

VOCAB = 32
KINDS = {
    BatchedFrequencyPenalizer,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
    BatchedMinNewTokensPenalizer,
}
PENALTIES = [
    {"frequency_penalty": 0.5},
    {"presence_penalty": 0.5},
    {"repetition_penalty": 1.5},
    {"min_new_tokens": 4},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.5, "min_new_tokens": 9},
]


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def row(output: list[int], **penalties) -> SimpleNamespace:
    params = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
    sampling = SimpleNamespace(
        **{**params, "min_new_tokens": 0, "stop_token_ids": {3}, **penalties}
    )
    return SimpleNamespace(
        sampling_params=sampling,
        origin_input_ids=array("q", [9, 8, 7]),
        output_ids=array("q", output),
        tokenizer=SimpleNamespace(additional_stop_token_ids=None, eos_token_id=2),
        eos_token_ids={2},
    )


def batch_of(*reqs: SimpleNamespace) -> SimpleNamespace:
    class Batch(SimpleNamespace):
        __slots__ = ("__weakref__",)

    batch = Batch(reqs=list(reqs), device="cpu", decoding_reqs=None)
    orchestrator = BatchedPenalizerOrchestrator(VOCAB, batch, KINDS)
    batch.sampling_info = SimpleNamespace(penalizer_orchestrator=orchestrator)
    return batch


def applied(batch: SimpleNamespace) -> torch.Tensor:
    logits = torch.linspace(-2, 2, VOCAB).repeat(len(batch.reqs), 1)
    batch.sampling_info.penalizer_orchestrator.apply(logits)
    return logits


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize(("lagging", "counted"), [(False, [5, 6, 5]), (True, [7, 5, 6])])
def test_a_resumed_row_counts_on(penalty, lagging, counted):
    undisturbed = batch_of(row([], **penalty))
    for token in counted:
        undisturbed.sampling_info.penalizer_orchestrator.cumulate_output_tokens(
            torch.tensor([token])
        )
    resumed = batch_of(row([]), row([5, 6, 5], **penalty), row([1, 1], frequency_penalty=0.1))
    fresh = applied(resumed)
    resumed_row = resumed.reqs[1]
    restore_penalties(resumed, lambda req: req is resumed_row, lagging=lagging)
    after = applied(resumed)
    assert torch.equal(after[1], applied(undisturbed)[0])
    assert torch.equal(after[[0, 2]], fresh[[0, 2]])


def test_a_row_that_decodes_beside_keeps_its_counts():
    decoding = row([5, 6], frequency_penalty=0.5)
    batch = batch_of(decoding)
    batch.sampling_info.penalizer_orchestrator.cumulate_output_tokens(torch.tensor([6]))
    batch.decoding_reqs = [decoding]
    before = applied(batch)
    restore_penalties(batch, lambda _req: True, lagging=False)
    assert torch.equal(applied(batch), before)
