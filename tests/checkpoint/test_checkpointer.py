"""The Checkpointer over SGLang's own radix tree, allocator and requests; no model, no server."""

from __future__ import annotations

import random
import warnings
from functools import cache

import pytest

from conserve_sgl.config import CheckpointConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    from checkpoint.kernel import GRID, ONLINE, Kernel, make_request
    from conserve_sgl.checkpoint.kv_pools import KvPools

STRIDE = 8
WINDOW = 9
CHECKPOINTED = CheckpointConfig(stride_tokens=STRIDE)
SHARED = list(range(20))


def kernel(
    config: CheckpointConfig = CHECKPOINTED,
    *,
    kv_tokens: int = 400,
    host_ratio: float | None = None,
    token_s: float = 1e-4,
    window: int | None = None,
    state_slots: int = 0,
    copies_states: bool = False,
) -> Kernel:
    return Kernel(
        kv_tokens=kv_tokens,
        rows=8,
        config=config,
        host_ratio=host_ratio,
        token_s=token_s,
        window=window,
        state_slots=state_slots,
        copies_states=copies_states,
    )


def prompt(i: int) -> list[int]:
    return [*SHARED, *range(1000 * (i + 1), 1000 * (i + 1) + 5 + i)]


@cache
def run_alone(i: int, tokens: int) -> list[int]:
    engine = kernel(kv_tokens=1000)
    req = make_request("alone", prompt(i), tokens)
    assert engine.prefill(req)
    while len(req.output_ids) < tokens:
        assert engine.decode([req])
    return list(req.output_ids)


def decode(engine: Kernel, req, tokens: int) -> None:
    for _ in range(tokens):
        assert engine.decode([req])


def test_a_request_is_checkpointed_every_stride():
    engine = kernel()
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    at_start = req.kv.cache_protected_len
    decode(engine, req, STRIDE - 1)
    assert req.kv.cache_protected_len == at_start
    decode(engine, req, 1)
    assert req.kv.cache_protected_len == at_start + STRIDE == req.seqlen - 1
    state = engine.checkpoints.state()
    assert (state["checkpoints"], state["checkpointed_tokens"]) == (1, STRIDE)
    assert state["checkpointed_bytes"] == STRIDE * 8  # keys and values of one float each


def test_giving_way_loses_nothing_that_was_computed():
    engine = kernel()
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, STRIDE + 3)
    computed = req.kv.kv_committed_len
    engine.checkpoints.give_way(req, urgent=True)
    assert not req.kv.holds_kv
    engine.assert_balanced()
    assert engine.prefill(req)
    state = engine.checkpoints.state()
    assert (state["restored_tokens"], state["recomputed_tokens"]) == (computed, 0)


@pytest.mark.parametrize("config", [CHECKPOINTED, CheckpointConfig(enabled=False)])
def test_what_was_evicted_is_computed_again_and_counted(config):
    engine = kernel(config)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, 30)
    computed = req.kv.kv_committed_len
    engine.checkpoints.give_way(req, urgent=False)
    engine.evict(10_000)
    assert engine.prefill(req)
    state = engine.checkpoints.state()
    assert (state["restored_tokens"], state["recomputed_tokens"]) == (0, computed)
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))


def test_turned_off_nothing_enters_the_tree_but_prompts():
    engine = kernel(CheckpointConfig(enabled=False))
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, 40)
    assert req.kv.cache_protected_len == len(prompt(0))
    assert engine.checkpoints.state()["checkpoints"] == 0


def test_the_one_that_loses_least_gives_way():
    engine = kernel()
    fresh, due = make_request("fresh", prompt(0), 100), make_request("due", prompt(1), 100)
    assert engine.prefill(due)
    decode(engine, due, STRIDE - 1)
    assert engine.prefill(fresh)
    assert engine.checkpoints.cheapest([due, fresh], []) is fresh
    decode(engine, due, 1)
    # Nothing of either is lost now: the one that sits out, however little it frees.
    assert engine.checkpoints.cheapest([due], [fresh]) is fresh
    assert engine.checkpoints.cheapest([], []) is None


def test_what_others_may_share_is_not_counted_as_free():
    engine = kernel()
    first, second = make_request("1", prompt(0), 100), make_request("2", prompt(1), 100)
    assert engine.prefill(first)
    assert engine.prefill(second)
    assert engine.checkpoints.reclaimable_tokens(first) == first.kv.kv_committed_len
    decode(engine, second, STRIDE)
    held = second.kv.kv_committed_len
    assert engine.checkpoints.reclaimable_tokens(second) == held - len(SHARED)


def test_what_was_evicted_from_the_device_comes_back_from_the_host():
    engine = kernel(host_ratio=3)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, 30)
    computed = req.kv.kv_committed_len
    engine.checkpoints.give_way(req, urgent=False)
    engine.poll()
    engine.poll()
    engine.evict(10_000)
    assert engine.allocator.available_size() == engine.kv_tokens
    assert engine.prefill(req)
    state = engine.checkpoints.state()
    assert state["host_cache"]
    assert (state["restored_tokens"], state["recomputed_tokens"]) == (computed, 0)
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))


def test_a_load_back_that_fails_costs_recomputation(monkeypatch):
    engine = kernel(host_ratio=3)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, 30)
    computed = req.kv.kv_committed_len
    engine.checkpoints.give_way(req, urgent=False)
    engine.poll()
    engine.poll()
    engine.evict(10_000)
    monkeypatch.setattr(engine.tree, "load_back", lambda *_args, **_kwargs: False)
    assert engine.prefill(req)
    state = engine.checkpoints.state()
    assert (state["restored_tokens"], state["recomputed_tokens"]) == (0, computed)
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))


def test_a_host_without_room_is_counted_and_the_checkpoint_lives_on_the_device(monkeypatch):
    engine = kernel(host_ratio=3)
    host = engine.tree.cache_controller.mem_pool_host
    monkeypatch.setattr(host, "available_size", lambda: 0)
    monkeypatch.setattr(engine.tree, "evict_host", lambda *_args, **_kwargs: 0)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, STRIDE)
    state = engine.checkpoints.state()
    assert (state["checkpoints"], state["host_full"]) == (1, 1)
    assert engine.checkpoints.cheapest([req], []) is req
    engine.checkpoints.give_way(req, urgent=False)
    assert engine.prefill(req)
    assert engine.checkpoints.state()["recomputed_tokens"] == 0


def test_memory_that_is_needed_now_is_not_pinned_by_a_copy():
    engine = kernel(host_ratio=3)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, STRIDE - 1)  # nothing but the prompt is on the host
    for _ in range(2):
        engine.poll()
    engine.checkpoints.give_way(req, urgent=True)
    free = engine.allocator.available_size() + engine.tree.evictable_size()
    assert free == engine.kv_tokens


CHEAP_S = 1e-10
"""To compute a token again takes less than to copy its KV."""


def on_host(engine: Kernel) -> int:
    host = engine.tree.cache_controller.mem_pool_host
    return host.size - host.available_size()


def test_where_copies_do_not_pay_nothing_is_copied_while_requests_run():
    engine = kernel(host_ratio=3, token_s=CHEAP_S)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, 3 * STRIDE)
    assert on_host(engine) == 0
    state = engine.checkpoints.state()
    assert (state["checkpoints"], state["host_full"], state["backlog_tokens"]) == (0, 0, 0)


def test_where_copies_do_not_pay_a_prefix_is_copied_once_it_is_shared():
    engine = kernel(host_ratio=3, token_s=CHEAP_S)
    assert engine.prefill(make_request("a", prompt(0), 100))
    assert on_host(engine) == 0
    assert engine.prefill(make_request("b", prompt(1), 100))
    assert on_host(engine) == len(SHARED)


def test_where_copies_do_not_pay_a_request_is_copied_when_it_gives_way():
    engine = kernel(host_ratio=3, token_s=CHEAP_S)
    req = gone_from_the_device(engine)
    assert on_host(engine) == req.seqlen - 1
    assert engine.prefill(req)
    assert engine.checkpoints.state()["recomputed_tokens"] == 0
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))


def test_where_copies_do_not_pay_memory_that_is_needed_now_keeps_kv_until_somebody_takes_it():
    engine = kernel(host_ratio=3, token_s=CHEAP_S)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, STRIDE + 3)
    engine.checkpoints.give_way(req, urgent=True)
    assert on_host(engine) == 0
    free = engine.allocator.available_size() + engine.tree.evictable_size()
    assert free == engine.kv_tokens
    assert engine.prefill(req)
    assert engine.checkpoints.state()["recomputed_tokens"] == 0
    engine.checkpoints.give_way(req, urgent=True)
    engine.evict(10_000)
    assert engine.prefill(req)
    assert engine.checkpoints.state()["recomputed_tokens"] > 0
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))


def test_copies_pay_once_requests_give_way_often():
    dear_enough_s = 8 / 17e9 * 2  # to copy 8 bytes takes half of that
    engine = kernel(host_ratio=3, token_s=dear_enough_s)
    assert not engine.checkpoints.copies_pay()
    for i in range(6):
        req = make_request(str(i), prompt(i), 100)
        assert engine.prefill(req)
        engine.checkpoints.give_way(req, urgent=True)
    assert engine.checkpoints.copies_pay()
    req = make_request("next", prompt(7), 100)
    assert engine.prefill(req)
    assert on_host(engine) > 0


def test_without_checkpoints_all_is_copied_as_sglang_does():
    engine = kernel(CheckpointConfig(enabled=False), host_ratio=3, token_s=CHEAP_S)
    assert engine.prefill(make_request("a", prompt(0), 100))
    assert on_host(engine) == len(prompt(0))


def test_kv_of_online_requests_is_copied_as_sglang_does():
    engine = kernel(host_ratio=3, token_s=CHEAP_S)
    req = make_request("online", prompt(0), 100)
    req.priority = ONLINE
    assert engine.prefill(req)
    assert on_host(engine) == len(prompt(0))


def test_the_backlog_of_the_copy_engine_is_seen():
    engine = kernel(host_ratio=3)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    assert engine.checkpoints.state()["backlog_tokens"] == len(prompt(0))
    engine.poll()
    engine.poll()
    assert engine.checkpoints.state()["backlog_tokens"] == 0


def gone_from_the_device(engine: Kernel, i: int = 0, tokens: int = 80):
    """A request that gave way and has its KV on the host alone."""
    req = make_request(str(i), prompt(i), 2 * tokens)
    assert engine.prefill(req)
    decode(engine, req, tokens)
    engine.checkpoints.give_way(req, urgent=False)
    engine.poll()
    engine.poll()
    engine.evict(10_000)
    return req


def test_kv_is_loaded_before_its_turn():
    engine = kernel(host_ratio=3)
    req = gone_from_the_device(engine)
    assert engine.load_ahead([req]) == [req]
    engine.poll()
    assert engine.load_ahead([req]) == []
    assert engine.prefill(req)
    assert engine.last_waits_for == -1  # all of it was there
    state = engine.checkpoints.state()
    assert state["loaded_ahead_tokens"] == state["restored_tokens"] > 90
    assert state["recomputed_tokens"] == 0
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))


def test_a_prefill_that_finds_what_is_being_loaded_waits_for_it():
    engine = kernel(host_ratio=3)
    req = gone_from_the_device(engine)
    other = make_request("other", prompt(0), 20)
    engine.poll = lambda: None  # nobody hears that the copy is done
    assert engine.load_ahead([req]) == [req]
    assert engine.prefill(other)
    assert engine.last_waits_for >= 0


def test_requests_that_come_back_together_are_loaded_together():
    engine = kernel(host_ratio=3)
    first, second = gone_from_the_device(engine, 0), gone_from_the_device(engine, 1)
    assert engine.load_ahead([first, second]) == [first, second]
    third = gone_from_the_device(engine, 2)  # polls
    assert engine.load_ahead([first, second, third]) == [third]


def test_one_that_comes_while_others_are_loaded_waits_for_its_own_load():
    engine = kernel(host_ratio=3)
    first, second = gone_from_the_device(engine, 0), gone_from_the_device(engine, 1)
    assert engine.load_ahead([first]) == [first]
    assert engine.load_ahead([first, second]) == [first, second]
    engine.poll()
    assert engine.load_ahead([first, second]) == [second]
    engine.poll()
    assert engine.load_ahead([first, second]) == []


def test_a_request_is_loaded_once_and_then_admitted_as_it_is():
    engine = kernel(host_ratio=3)
    req = gone_from_the_device(engine)
    assert engine.load_ahead([req]) == [req]
    engine.poll()
    engine.evict(10_000)
    assert engine.load_ahead([req]) == []
    assert engine.prefill(req)
    assert engine.checkpoints.state()["recomputed_tokens"] == 0


@pytest.mark.parametrize("room", [-5, 0, 50])
def test_nothing_is_loaded_where_it_does_not_fit(room):
    engine = kernel(host_ratio=3)
    req = gone_from_the_device(engine)
    for _ in range(2):
        assert engine.checkpoints.load_ahead([req], room) == []
    assert engine.checkpoints.state()["loaded_ahead_tokens"] == 0


def test_without_a_host_cache_nobody_waits_for_it():
    engine = kernel()
    req = gone_from_the_device(engine)
    assert engine.load_ahead([req]) == []


def test_what_waits_stays_on_the_host_whoever_else_needs_room():
    engine = kernel(host_ratio=3)
    req = gone_from_the_device(engine)
    assert engine.checkpoints.state()["pinned_tokens"] == req.seqlen - 1
    engine.tree.evict_host(10_000)
    assert engine.prefill(req)
    state = engine.checkpoints.state()
    assert (state["recomputed_tokens"], state["pinned_tokens"]) == (0, 0)
    engine.checkpoints.give_way(req, urgent=False)
    engine.checkpoints.forget([req])
    engine.assert_balanced()


def test_half_of_the_host_pool_is_left_to_others():
    engine = kernel(host_ratio=1.1)
    waiting = [gone_from_the_device(engine, i) for i in range(4)]
    pinned = engine.checkpoints.state()["pinned_tokens"]
    host = engine.tree.cache_controller.mem_pool_host
    assert host.size / 4 < pinned <= host.size / 2
    engine.checkpoints.forget(waiting)
    assert engine.checkpoints.state()["pinned_tokens"] == 0
    engine.assert_balanced()


def test_a_flush_forgets_what_was_pinned():
    engine = kernel(host_ratio=3)
    req = gone_from_the_device(engine)
    engine.tree.reset()
    engine.allocator.clear()
    engine.checkpoints.cache_emptied()
    engine.checkpoints.forget([req])
    assert engine.checkpoints.state()["pinned_tokens"] == 0
    assert engine.prefill(req)
    assert engine.checkpoints.state()["restored_tokens"] == 0


@pytest.mark.parametrize("token_s", [1e-4, CHEAP_S], ids=["copies pay", "they do not"])
@pytest.mark.parametrize("host_ratio", [None, 3, 1.1], ids=["tree", "host", "small host"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["all layers", "window"])
@pytest.mark.parametrize("seed", range(4))
def test_random_lives_end_with_the_tokens_of_a_run_alone(seed, window, host_ratio, token_s):
    """A dozen requests in a pool for a few; each preempted when memory ends, and at random."""
    chance = random.Random(seed)
    kv_tokens = chance.choice([170, 260, 400])
    engine = kernel(kv_tokens=kv_tokens, host_ratio=host_ratio, token_s=token_s, window=window)
    live(engine, chance)


@pytest.mark.parametrize("copies_states", [False, True], ids=["no_buffer", "extra_buffer"])
@pytest.mark.parametrize("seed", range(8))
def test_random_lives_with_states_end_with_the_tokens_of_a_run_alone(seed, copies_states):
    """With slots for four rows to seven, of which six run."""
    chance = random.Random(seed)
    slots = (2 + copies_states) * chance.choice([4, 5, 7]) + chance.choice([0, 1])
    kv_tokens = chance.choice([170, 260, 400])
    live(kernel(kv_tokens=kv_tokens, state_slots=slots, copies_states=copies_states), chance)


def live(engine: Kernel, chance: random.Random) -> None:
    tokens = 60
    waiting = [make_request(str(i), prompt(i), tokens) for i in range(12)]
    running: list = []
    preempted = 0
    for _ in range(5000):
        if not waiting and not running:
            break
        held = engine.load_ahead(waiting[:3]) if chance.random() < 0.7 else []
        room = waiting and len(running) < 6 and waiting[0] not in held
        if room and engine.prefill(waiting[0]):
            running.append(waiting.pop(0))
        for req in [r for r in running if chance.random() < 0.02]:
            running.remove(req)
            engine.checkpoints.give_way(req, urgent=False)
            waiting.append(req)
            preempted += 1
        if chance.random() < 0.02:
            engine.evict(chance.randrange(200))
        while running and not engine.decode(running):
            victim = engine.checkpoints.cheapest(running, [])
            running.remove(victim)
            engine.checkpoints.give_way(victim, urgent=True)
            waiting.append(victim)
            preempted += 1
        for req in [r for r in running if len(r.output_ids) >= tokens]:
            running.remove(req)
            engine.finish(req)
            # A resume whose prefill gave the last token decoded one more in the same step.
            assert list(req.output_ids[:tokens]) == run_alone(int(req.rid), tokens)
    assert not waiting
    assert not running
    assert preempted > 3
    engine.assert_balanced()


def test_a_window_that_is_gone_costs_recomputation_and_no_more():
    engine = kernel(window=WINDOW)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, 30)
    computed = req.kv.kv_committed_len
    engine.checkpoints.give_way(req, urgent=False)
    engine.tree.evict(EvictParams(swa_num_tokens=engine.kv_tokens))
    assert engine.room() == engine.kv_tokens
    assert engine.prefill(req)
    state = engine.checkpoints.state()
    assert (state["restored_tokens"], state["recomputed_tokens"]) == (0, computed)
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))


def test_a_request_holds_no_more_than_its_window_in_the_pool_of_windows():
    engine = kernel(window=WINDOW)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, 60)
    pools = KvPools(engine.tree)
    assert engine.kv_tokens - pools.free_tokens == req.kv.kv_committed_len
    assert engine.allocator.size_swa - pools.free_window_tokens <= 2 * WINDOW + STRIDE
    engine.checkpoints.give_way(req, urgent=True)
    engine.assert_balanced()


@pytest.mark.parametrize("also_on_the_device", [False, True])
def test_windows_come_back_from_the_host(also_on_the_device):
    """With the KV of the other layers, or where the device has that still."""
    engine = kernel(host_ratio=3, window=WINDOW)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, 80)
    engine.checkpoints.give_way(req, urgent=False)
    engine.poll()
    engine.poll()
    tokens = 0 if also_on_the_device else 10_000
    engine.tree.evict(EvictParams(num_tokens=tokens, swa_num_tokens=10_000))
    assert engine.prefill(req)
    assert engine.checkpoints.state()["recomputed_tokens"] == 0
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))
    engine.checkpoints.give_way(req, urgent=False)
    engine.checkpoints.forget([req])
    engine.assert_balanced()


STATES = pytest.mark.parametrize("copies_states", [False, True], ids=["no_buffer", "extra_buffer"])


@STATES
def test_a_checkpoint_ends_where_there_is_a_state(copies_states):
    engine = kernel(state_slots=20, copies_states=copies_states)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    while req.kv.cache_protected_len < 6 * GRID:
        decode(engine, req, 1)
        kept = req.kv.cache_protected_len
        assert kept % GRID == 0 if copies_states else kept <= req.kv.kv_committed_len
    decode(engine, req, 3)
    computed = req.kv.kv_committed_len
    kept = computed // GRID * GRID if copies_states else computed
    engine.checkpoints.give_way(req, urgent=False)
    assert engine.prefill(req)
    state = engine.checkpoints.state()
    assert (state["restored_tokens"], state["recomputed_tokens"]) == (kept, computed - kept)
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))


@STATES
def test_without_a_slot_to_spare_nothing_is_kept_and_nothing_ends(copies_states):
    per_row = 2 + copies_states
    engine = kernel(state_slots=2 * per_row + 1, copies_states=copies_states)
    assert engine.checkpoints.states.free_rows == 2
    reqs = [make_request(str(i), prompt(i), 100) for i in range(3)]
    assert engine.prefill(reqs[0])
    assert engine.prefill(reqs[1])
    assert not engine.prefill(reqs[2])
    for _ in range(3 * GRID):
        assert engine.decode(reqs[:2])
    engine.checkpoints.give_way(reqs[1], urgent=True)
    assert engine.prefill(reqs[2])
    decode(engine, reqs[2], 2 * GRID)
    for i in (0, 2):
        engine.checkpoints.give_way(reqs[i], urgent=True)
        assert list(reqs[i].output_ids) == run_alone(i, len(reqs[i].output_ids))
    engine.assert_balanced()


def test_a_state_that_is_gone_costs_recomputation_and_no_more():
    engine = kernel(state_slots=20)
    req = make_request("a", prompt(0), 100)
    assert engine.prefill(req)
    decode(engine, req, 30)
    computed = req.kv.kv_committed_len
    engine.checkpoints.give_way(req, urgent=False)
    engine.tree.evict(EvictParams(num_tokens=0, mamba_num=20))
    assert engine.prefill(req)
    state = engine.checkpoints.state()
    assert (state["restored_tokens"], state["recomputed_tokens"]) == (0, computed)
    decode(engine, req, 10)
    assert list(req.output_ids) == run_alone(0, len(req.output_ids))


def test_a_slot_that_a_request_got_as_it_was_looked_up_is_taken_back():
    engine = kernel(state_slots=20)
    first = make_request("a", prompt(0), 100)
    second = make_request("b", [*prompt(0), 7, 8], 100)
    assert engine.prefill(first)
    engine.finish(first)
    second.init_next_round_input(engine.tree)
    assert second.kv.holds_mamba
    engine.checkpoints.states.take_back(second)
    engine.assert_balanced()
    assert engine.prefill(second)
    engine.checkpoints.states.take_back(second)  # it holds a row now, and keeps its slot
    decode(engine, second, 5)
    engine.checkpoints.give_way(second, urgent=False)
    engine.assert_balanced()
