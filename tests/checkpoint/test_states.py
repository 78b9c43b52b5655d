"""Of which position a state is that may be kept, with a step in flight; over numbers."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang warns about absent GPU kernels while it is imported
    from conserve_sgl.checkpoint import states
    from conserve_sgl.checkpoint.states import StateSlots

GRID = 64


@pytest.fixture(autouse=True)
def grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "mamba_track_grid", lambda _page: GRID)


def slots(*, copies: int, free: int = 100, shares: bool = True, in_int8: bool = False):
    pool = SimpleNamespace(
        mamba_initial_tracking_slots=copies,
        mamba_ckpt_pool=object() if in_int8 else None,
        mamba_allocator=SimpleNamespace(available_size=lambda: free),
    )
    tree = SimpleNamespace(
        supports_mamba=lambda: True,
        supports_prefix_sharing=lambda: shares,
        mamba_evictable_size=lambda: 10,
        req_to_token_pool=pool,
        page_size=1,
    )
    return StateSlots(tree)


class Row:
    """A request after a step that computed so many tokens; what is in flight is beyond them.

    copied_at: where its state was copied last, into slot `last`; the next goes into slot `next_`.
    """

    def __init__(self, computed, *, in_flight=0, copied_at=None, last=0, next_=1) -> None:
        self.seqlen = computed + 1
        self.kv = SimpleNamespace(
            kv_committed_len=computed + in_flight,
            mamba_last_track_seqlen=copied_at,
            mamba_last_track_idx=last,
            mamba_next_track_idx=next_,
            mamba_ping_pong_track_buffer=[7, 8],
        )


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (Row(100, copied_at=64), 64),
        (Row(100, in_flight=1, copied_at=64), 64),
        (Row(100, in_flight=1, copied_at=90), 90),  # a prompt's, from its own prefix on
        (Row(100, copied_at=None), 0),
        (Row(128, copied_at=128), 128),
        (Row(127, in_flight=1, copied_at=64), 0),  # the next copy is in flight
        (Row(128, in_flight=1, copied_at=128), 128),
        (Row(130, in_flight=1, copied_at=64), 0),  # a copy that was left out
        (Row(100, copied_at=110), 0),  # beyond what may be kept
    ],
)
def test_with_copies_it_is_that_of_the_last_copy(row, kept):
    assert slots(copies=2).kept_len(row, row.seqlen - 1) == kept


def test_without_copies_it_is_that_of_all_that_was_computed():
    assert slots(copies=0).kept_len(Row(100), 100) == 100
    assert slots(copies=0).kept_len(Row(100), 99) == 0
    assert slots(copies=0).kept_len(Row(99, in_flight=1), 99) == 0


@pytest.mark.parametrize(("copies", "needed"), [(0, 3), (1, 4), (2, 5)])
def test_nothing_is_kept_where_a_row_would_find_no_slots_then(copies, needed):
    row = Row(128, copied_at=128)
    assert slots(copies=copies, free=needed - 10).kept_len(row, 128) == 128
    assert slots(copies=copies, free=needed - 11).kept_len(row, 128) == 0


def test_rows_are_free_as_far_as_there_are_slots():
    assert slots(copies=0, free=0).free_rows == 4  # two each, one to lock in between, of ten
    assert slots(copies=2, free=0).free_rows == 2
    assert slots(copies=2, free=0, in_int8=True).free == 0
    assert slots(copies=0, free=0, shares=False).free_rows == 10


def test_without_state_space_layers_there_is_no_end():
    none = StateSlots(SimpleNamespace(supports_mamba=lambda: False))
    assert none.free == none.free_rows == math.inf
    assert none.kept_len(Row(100), 77) == 77
    none.take_back(Row(100))


@pytest.mark.parametrize(
    ("row", "next_"),
    [
        (Row(128, copied_at=128, last=1, next_=1), 0),  # taken twice: no step came after
        (Row(130, in_flight=1, copied_at=128, last=1, next_=1), 0),
        (Row(128, copied_at=128, last=1, next_=0), 0),
        (Row(127, in_flight=1, copied_at=64, last=1, next_=1), 1),  # foreseen: it goes to the other
        (Row(127, in_flight=1, copied_at=64, last=1, next_=0), 0),
    ],
)
def test_the_next_copy_spares_the_last(row, next_):
    slots(copies=2).settle(row)
    assert row.kv.mamba_next_track_idx == next_


def test_a_single_slot_is_no_choice():
    row = Row(128, copied_at=128, last=0, next_=0)
    slots(copies=1).settle(row)
    assert row.kv.mamba_next_track_idx == 0


def test_a_request_that_was_released_has_none():
    row = Row(128, last=0, next_=0)
    row.kv.mamba_ping_pong_track_buffer = None
    slots(copies=2).settle(row)
    assert row.kv.mamba_next_track_idx == 0
