"""Drafts from n-grams, and the KV slots of a step that verifies them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from conserve_sgl.platform import drafts
from conserve_sgl.platform.drafts import NgramTable, NgramWorker, draft_slots


class TestTable:
    def test_a_text_that_was_read_is_drafted_as_it_goes_on(self) -> None:
        table = NgramTable(100)
        table.read([1, 2, 3, 4, 5, 6, 7])
        assert table.draft([9, 9, 2, 3], 3) == [4, 5, 6]

    def test_where_nothing_is_known_it_says_something(self) -> None:
        table = NgramTable(100)
        table.read([1, 2, 3])
        assert table.draft([1, 2], 3) == [3, 0, 0]
        assert table.draft([7], 2) == [0, 0]

    def test_the_longer_context_decides(self) -> None:
        table = NgramTable(100)
        table.read([1, 2, 3, 4, 5])
        table.read([8, 9, 3, 4, 6])
        assert table.draft([1, 2, 3, 4], 1) == [5]
        assert table.draft([3, 4], 1) == [6]

    def test_the_oldest_is_forgotten(self) -> None:
        table = NgramTable(4)
        table.read(range(100))
        assert table.draft([10, 11], 1) == [0]
        assert table.draft([95, 96, 97, 98], 1) == [99]

    @given(text=st.lists(st.integers(0, 5), max_size=60), n=st.integers(0, 8))
    def test_any_text_gets_as_many_drafts_as_asked_for(self, text: list[int], n: int) -> None:
        table = NgramTable(30)
        table.read(text)
        assert len(table.draft(text, n)) == n


def test_slots_are_entered_and_read_row_by_row() -> None:
    table = torch.zeros(4, 12, dtype=torch.int32)
    rows = torch.tensor([2, 0])
    start, end = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([6, 5], dtype=torch.int32)
    drafts._write_slots(rows, table, start, end, torch.arange(10, 17), 2)
    assert table[2].tolist() == [0, 0, 0, 10, 11, 12, 0, 0, 0, 0, 0, 0]
    assert table[0].tolist() == [0, 13, 14, 15, 16, 0, 0, 0, 0, 0, 0, 0]
    slots = draft_slots(
        req_pool_indices=rows,
        req_to_token=table,
        start_offset=torch.tensor([4, 1]),
        draft_token_num=2,
        batch_size=2,
    )
    assert slots.tolist() == [11, 12, 13, 14]


def test_what_the_last_step_gave_counts_once() -> None:
    """With overlap scheduling a request is told of it a step later, or was while it sat out."""
    worker = object.__new__(NgramWorker)
    worker._width = 3
    given_last = SimpleNamespace(
        accept_tokens=torch.tensor([7, 8, 0, 5, 0, 0]), accept_lens=torch.tensor([2, 1])
    )
    batch = SimpleNamespace(
        reqs=[SimpleNamespace(seqlen=11), SimpleNamespace(seqlen=21)],
        seq_lens=torch.tensor([12, 20]),
        spec_info=given_last,
    )
    assert worker._in_flight(batch) == [[7, 8], []]


class FakeModel:
    """What follows a token is a function of it; logits are asked for at every place."""

    VOCABULARY = 11

    def __init__(self) -> None:
        self.model_runner = SimpleNamespace(sampler=self._sample)

    @classmethod
    def after(cls, token: int) -> int:
        return (3 * token + 4) % cls.VOCABULARY

    def forward_batch_generation(self, batch: Any, *, is_verify: bool) -> GenerationBatchResult:
        assert is_verify
        assert batch.forward_mode is ForwardMode.TARGET_VERIFY
        best = torch.tensor([self.after(token) for token in batch.input_ids.tolist()])
        logits = torch.nn.functional.one_hot(best, self.VOCABULARY).float()
        return GenerationBatchResult(logits_output=SimpleNamespace(next_token_logits=logits))

    @staticmethod
    def _sample(output: Any, *_known: Any) -> torch.Tensor:
        return output.next_token_logits.argmax(-1)


@pytest.mark.parametrize("overlap", [False, True])
def test_whatever_is_drafted_the_tokens_are_the_model_s(overlap: bool) -> None:
    """Two rows over some steps; with overlap each is told what a step gave a step later."""
    worker = object.__new__(NgramWorker)
    worker._width = worker.speculative_num_draft_tokens = 4
    worker._table, worker._known = NgramTable(1000), set()
    worker._target_worker = FakeModel()
    reqs = [FakeReq("a", [1, 2, 3]), FakeReq("b", [9])]
    table = torch.arange(2 * 64).view(2, 64)
    info = SimpleNamespace(apply_logits_bias=lambda _logits: None)
    # The first token of each comes of its prefill.
    given = [[FakeModel.after(req.origin_input_ids[-1])] for req in reqs]
    lengths = torch.tensor([len(req.origin_input_ids) for req in reqs])
    most = 0
    for _ in range(12):
        told = given
        if not overlap:
            tell(reqs, told)
        flat = [token for tokens in told for token in [*tokens, 0, 0, 0][:4]]
        batch = SimpleNamespace(
            reqs=reqs,
            seq_lens=lengths,
            forward_mode=ForwardMode.DECODE,
            req_pool_indices=torch.tensor([1, 0]),
            req_to_token_pool=SimpleNamespace(req_to_token=table),
            spec_info=SimpleNamespace(
                accept_tokens=torch.tensor(flat),
                accept_lens=torch.tensor([len(tokens) for tokens in told]),
            ),
            return_logprob=False,
            has_grammar=False,
            sampling_info=info,
        )
        published = []
        with mock.patch.object(drafts, "_for_each_place", lambda info, _width: info):
            result = worker.forward_batch_generation(batch, published.append)
        if overlap:
            tell(reqs, told)
        counts = result.accept_lens.tolist()
        rows = result.next_token_ids.view(2, 4).tolist()
        given = [tokens[:count] for tokens, count in zip(rows, counts, strict=True)]
        assert batch.out_cache_loc.tolist() == [
            64 * row + start + i
            for row, start in zip((1, 0), lengths.tolist(), strict=True)
            for i in range(4)
        ]
        lengths = lengths + result.accept_lens
        assert published[0].tolist() == lengths.tolist()
        most = max(most, *counts)
    tell(reqs, given)
    for req in reqs:
        text = [*req.origin_input_ids, *req.output_ids]
        start = len(req.origin_input_ids)
        assert text[start:] == [FakeModel.after(token) for token in text[start - 1 : -1]]
    assert most == 4  # what repeats is drafted right


class FakeReq:
    def __init__(self, rid: str, prompt: list[int]) -> None:
        self.rid = rid
        self.origin_input_ids = prompt
        self.output_ids: list[int] = []

    @property
    def seqlen(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)


def tell(reqs: list[FakeReq], given: list[list[int]]) -> None:
    for req, tokens in zip(reqs, given, strict=True):
        req.output_ids += tokens


def test_every_place_of_a_row_is_sampled_as_the_row_asks() -> None:
    info = SamplingBatchInfo(
        temperatures=torch.tensor([[0.5], [1.0]]),
        top_ps=torch.tensor([0.9, 1.0]),
        top_ks=torch.tensor([1, 7]),
        min_ps=torch.zeros(2),
        is_all_greedy=False,
        is_any_greedy=True,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=False,
        vocab_size=9,
        sampling_seed=torch.tensor([3, 4]),
        acc_additive_penalties=torch.tensor([[1.0], [2.0]]),
        device="cpu",
    )
    places = drafts._for_each_place(info, 3)
    assert places.temperatures.flatten().tolist() == [0.5] * 3 + [1.0] * 3
    assert places.top_ks.tolist() == [1, 1, 1, 7, 7, 7]
    assert places.sampling_seed.tolist() == [3, 3, 3, 4, 4, 4]
    assert places.acc_additive_penalties.flatten().tolist() == [1.0] * 3 + [2.0] * 3
    assert places.logit_bias is None
    assert info.top_ks.tolist() == [1, 7]
