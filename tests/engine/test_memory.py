"""Who gives way when one of two KV pools, or states, are short: KvMemory over pools that are
numbers."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang warns about absent GPU kernels while it is imported
    from conserve_sgl.checkpoint.states import StateSlots
    from conserve_sgl.engine.memory import KvMemory

FULL, WINDOWS = 1000, 300
HELD, HELD_IN_WINDOWS = 100, 60  # by each request
SLOTS, HELD_SLOTS, ROWS = 12, 2, 8  # of states; and of those by each request: its own and a locked


class Request:
    """One is none of the others."""

    def __init__(self, *, offline: bool) -> None:
        self.offline = offline


class Batch:
    """As much of a running batch as gives way."""

    def __init__(self, reqs: list[Request]) -> None:
        self.reqs = reqs

    def filter_batch(self, *, reqs_to_exclude: list[Request]) -> None:
        self.reqs = [req for req in self.reqs if req not in reqs_to_exclude]


class Memory:
    """A KvMemory whose requests hold KV in both pools, of which the tree has none."""

    def __init__(
        self, *, online: int, offline: int, has_windows: bool = True, has_states: bool = False
    ) -> None:
        reqs = [Request(offline=False) for _ in range(online)]
        reqs += [Request(offline=True) for _ in range(offline)]
        self.running = Batch(reqs)
        allocator = SimpleNamespace(
            available_size=lambda: FULL - HELD * len(self.running.reqs),
            full_available_size=lambda: FULL - HELD * len(self.running.reqs),
            swa_available_size=lambda: WINDOWS - HELD_IN_WINDOWS * len(self.running.reqs),
        )
        tree = SimpleNamespace(
            token_to_kv_pool_allocator=allocator,
            page_size=1,
            supports_swa=lambda: has_windows,
            evictable_size=lambda: 0,
            full_evictable_size=lambda: 0,
            swa_evictable_size=lambda: 0,
            supports_mamba=lambda: has_states,
            supports_prefix_sharing=lambda: True,
            mamba_evictable_size=lambda: 1,
            req_to_token_pool=SimpleNamespace(
                mamba_initial_tracking_slots=0,
                mamba_ckpt_pool=None,
                mamba_allocator=SimpleNamespace(
                    available_size=lambda: SLOTS - HELD_SLOTS * len(self.running.reqs) - 1
                ),
            ),
        )
        self.requeued: list[Request] = []
        self.memory = KvMemory(
            tree,
            total_tokens=FULL,
            checkpoints=SimpleNamespace(
                cheapest=lambda offline, _aside: offline[0] if offline else None,
                give_way=lambda _req, *, urgent: None,  # noqa: ARG005
                states=StateSlots(tree),
            ),
            aside=SimpleNamespace(reqs=[], slices=SimpleNamespace(suspended_reqs=[])),
            is_offline=lambda req: req.offline,
            requeue=self.requeued.append,
            free_rows=lambda: ROWS - len(self.running.reqs),
        )

    def make_room(self, tokens: int, window_tokens: int) -> bool:
        return self.memory.make_room(self.running, tokens, window_tokens)


@pytest.mark.parametrize(
    ("tokens", "window_tokens", "gave_way"),
    [(500, 0, 0), (700, 0, 1), (500, 61, 1), (500, 180, 2), (800, 61, 2)],
)
def test_offline_requests_give_way_for_the_pool_that_is_short(tokens, window_tokens, gave_way):
    memory = Memory(online=1, offline=3)
    assert memory.make_room(tokens, window_tokens)
    assert len(memory.requeued) == gave_way


def test_a_window_that_cannot_be_had_is_no_reason_to_wait():
    memory = Memory(online=1, offline=3)
    assert memory.make_room(800, WINDOWS + 1)
    assert len(memory.requeued) == 3


def test_kv_that_cannot_be_had_is():
    memory = Memory(online=2, offline=1)
    assert not memory.make_room(850, 0)
    assert len(memory.requeued) == 1


def test_without_a_pool_of_windows_none_is_short():
    memory = Memory(online=1, offline=3, has_windows=False)
    assert memory.make_room(600, 10_000)
    assert memory.requeued == []


def test_what_is_told_of_kv_is_that_of_the_layers_without_a_window():
    assert Memory(online=1, offline=3).memory.free_tokens == FULL - 4 * HELD


def test_a_row_is_free_where_the_slots_of_its_states_are():
    """Eight rows, and slots for five."""
    assert Memory(online=1, offline=3).memory.free_rows == 4
    memory = Memory(online=1, offline=3, has_states=True).memory
    assert memory.free_rows == 1
    assert Memory(online=0, offline=0, has_states=True).memory.free_rows == 5


@pytest.mark.parametrize(("wanted", "gave_way"), [(1, 0), (2, 1), (3, 2), (4, 3)])
def test_offline_requests_give_way_for_states(wanted, gave_way):
    memory = Memory(online=1, offline=3, has_states=True)
    assert memory.memory.make_rows(memory.running, wanted)
    assert len(memory.requeued) == gave_way


@pytest.mark.parametrize("wanted", [1, 9])
def test_without_states_one_row_is_enough(wanted):
    memory = Memory(online=5, offline=3)
    assert memory.memory.make_rows(memory.running, wanted)
    assert len(memory.requeued) == 1


def test_states_that_cannot_be_had_are_waited_for():
    memory = Memory(online=5, offline=0, has_states=True)
    assert not memory.memory.make_rows(memory.running, 1)


@pytest.mark.parametrize(
    ("online_waiting", "offline_wanted", "admissible"), [(0, 5, 3), (1, 5, 2), (1, 1, 1), (4, 5, 0)]
)
def test_offline_requests_are_tried_where_states_are_left(
    online_waiting, offline_wanted, admissible
):
    memory = Memory(online=1, offline=1, has_states=True).memory
    assert memory.admissible(online_waiting, offline_wanted) == admissible
    without = Memory(online=1, offline=1).memory
    assert without.admissible(online_waiting, offline_wanted) == offline_wanted
