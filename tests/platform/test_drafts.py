"""Drafts from n-grams, and the KV slots of a step that verifies them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

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
