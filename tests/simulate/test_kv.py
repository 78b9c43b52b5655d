from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_sgl.simulate.kv import KvPool
from conserve_sgl.simulate.request import Request


def request(group: str | None = None, prompt: int = 150) -> Request:
    blocks = () if group is None else (group,)
    return Request(
        online=False,
        due_s=0.0,
        prompt_tokens=prompt,
        output_tokens=10,
        blocks=blocks,
        block_tokens=100 if blocks else 0,
    )


def test_a_shared_block_is_held_once_and_stays_when_nobody_holds_it():
    pool = KvPool(1000)
    first, second = request("a"), request("a")
    assert pool.admit(first) == 0
    pool.grow(first, 150)
    assert pool.free_tokens == 850
    assert pool.admit(second) == 100
    pool.grow(second, 50)
    assert pool.free_tokens == 800
    for one in (first, second):
        pool.release(one)
    assert pool.free_tokens == 1000
    assert pool.match(request("a")) == 100
    assert pool.match(request("b")) == 0


def test_two_that_compute_the_same_block_at_once_end_with_one():
    pool = KvPool(1000)
    pair = [request("a"), request("a")]
    for one in pair:
        pool.admit(one)
    for one in pair:
        pool.grow(one, 150)
    assert pool.free_tokens == 1000 - 100 - 2 * 50


def test_the_longest_unused_block_makes_room():
    pool = KvPool(350)
    for group in "abc":
        one = request(group, 110)
        pool.admit(one)
        pool.grow(one, 110)
        pool.release(one)
    again = request("a", 110)
    assert pool.admit(again) == 100  # used again: now the youngest
    pool.grow(again, 10)
    large = request(None, 150)
    pool.admit(large)
    pool.grow(large, 150)
    assert [pool.match(request(group)) for group in "abc"] == [100, 0, 0]


def test_a_prompt_is_never_found_whole():
    pool = KvPool(1000)
    one = request("a", 100)
    pool.admit(one)
    pool.grow(one, 100)
    assert pool.match(request("a", 100)) == 99


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nothing_is_lost_in_random_traffic(seed):
    rng, pool, held = random.Random(seed), KvPool(3000), []
    for _ in range(200):
        if held and rng.random() < 0.4:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            one = request(rng.choice(["a", "b", "c", None]), rng.randint(1, 250))
            pool.admit(one)
            pool.grow(one, one.prompt_tokens - one.resident)
            held.append(one)
        assert pool.free_tokens <= 3000
        own = sum(r.resident - r.shared for r in held)
        shared = {b for r in held for b in r.blocks[: r.shared // 100 if r.blocks else 0]}
        assert pool.free_tokens == 3000 - own - 100 * len(shared)
    for one in held:
        pool.release(one)
    assert pool.free_tokens == 3000
