"""The offline backlog: its order, its bound, and that it neither loses nor repeats a request."""

from __future__ import annotations

from array import array
from collections import Counter
from itertools import groupby
from math import inf

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from conserve_sgl.policy import Backlog, OfflineItem, OfflineQueue, prefix_key
from conserve_sgl.policy.offline_queue.prefix import PREFIX_BLOCK_TOKENS


class Request:
    """A request as opaque as the queue takes it; its name says what it is in a failure."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def push(queue: OfflineQueue, name: str, *, tokens: int = 10, **item) -> Request | None:
    """Push a request called `name`; None when the queue is full."""
    request = Request(name)
    pushed = queue.push(request, OfflineItem(rid=name, tokens=tokens, **item))
    return request if pushed else None


def queue_of(*names: str, capacity: int = 100, **item) -> OfflineQueue[Request]:
    queue: OfflineQueue[Request] = OfflineQueue(capacity)
    for name in names:
        assert push(queue, name, **item)
    return queue


def names(requests) -> list[str]:
    return [request.name for request in requests]


def take_all(queue: OfflineQueue) -> list[str]:
    return names(queue.take(len(queue)))


# ------------------------------------------------------------ one job: the basics


def test_first_come_first_served_where_nothing_else_decides():
    assert take_all(queue_of("c", "a", "b")) == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("n", "taken", "left"),
    [
        pytest.param(0, [], ["a", "b"], id="nothing asked, nothing taken"),
        pytest.param(-1, [], ["a", "b"], id="less than nothing"),
        pytest.param(1, ["a"], ["b"], id="one of two"),
        pytest.param(2, ["a", "b"], [], id="all of it"),
        pytest.param(9, ["a", "b"], [], id="more than there is"),
    ],
)
def test_take(n, taken, left):
    queue = queue_of("a", "b")
    assert names(queue.take(n)) == taken
    assert names(queue) == left


def test_take_from_an_empty_queue():
    assert queue_of().take(3) == []


def test_what_is_given_back_runs_first_and_in_its_order():
    queue = queue_of("a", "b", "c", "d")
    queue.give_back(queue.take(3))
    assert take_all(queue) == ["a", "b", "c", "d"]


def test_what_gave_way_runs_before_anything_newer_of_its_job():
    queue = queue_of("old", prefix=b"z")
    taken = queue.take(1)
    push(queue, "newer", prefix=b"a")
    queue.give_back(taken)
    assert take_all(queue) == ["old", "newer"]


def test_what_gives_way_early_does_not_wait_for_what_gives_way_late():
    """Under memory pressure requests give way all the time; the one that began first goes on."""
    queue = queue_of("a", "b", "c", "d")
    a, b, c = queue.take(3)
    for request in (a, c, b):
        queue.give_back([request])
    assert take_all(queue) == ["a", "b", "c", "d"]


def test_who_runs_next_is_known_if_it_gave_way():
    queue = queue_of("a", "b", "c")
    assert queue_of().next_that_gave_way() is None
    assert queue.next_that_gave_way() is None  # nobody ran yet
    a, b = queue.take(2)
    queue.give_back([b])
    assert queue.next_that_gave_way() is b
    queue.give_back([a])
    assert queue.next_that_gave_way() is a
    assert queue.take(2) == [a, b]
    push(queue, "soon", deadline_s=10.0)
    queue.give_back([a, b])
    assert queue.next_that_gave_way() is None  # one with a deadline runs before them
    assert names(queue.take(1)) == ["soon"]
    assert queue.next_that_gave_way() is a


def test_give_back_takes_any_iterable():
    queue = queue_of("a", "b", "c")
    queue.give_back(iter(queue.take(2)))
    assert take_all(queue) == ["a", "b", "c"]


def test_only_what_was_taken_can_be_given_back():
    queue = queue_of("a")
    with pytest.raises(KeyError):
        queue.give_back([Request("stranger")])
    assert take_all(queue) == ["a"]


def test_a_full_queue_refuses_and_stays_as_it_was():
    queue = queue_of("a", "b", capacity=2)
    assert queue.is_full
    assert push(queue, "c") is None
    assert take_all(queue) == ["a", "b"]


def test_a_full_queue_takes_back_what_it_had_accepted():
    queue = queue_of("a", "b", capacity=2)
    taken = queue.take(1)
    assert push(queue, "c")
    queue.give_back(taken)
    assert len(queue) == 3
    assert queue.is_full
    assert push(queue, "d") is None
    assert take_all(queue) == ["a", "b", "c"]


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_queue_without_room_is_refused(capacity):
    with pytest.raises(ValueError, match="at least one request"):
        OfflineQueue(capacity)


def test_a_request_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        OfflineItem(rid="a", tokens=0)


# ------------------------------------------------------------------------ removal


def test_remove_returns_the_matches_and_keeps_the_rest():
    queue = queue_of("a1", "b1", "a2", "b2", "a3")
    assert names(queue.remove(lambda request: request.name.startswith("a"))) == ["a1", "a2", "a3"]
    assert take_all(queue) == ["b1", "b2"]


def test_remove_by_id_takes_that_id_alone_and_only_if_it_waits():
    queue = queue_of("job-1", "job-10", "job-2", "jo")
    (taken,) = queue.take(1)
    assert taken.name == "job-1"
    assert queue.remove_rid("job-1") == queue.remove_rid("job") == queue.remove_rid("") == []
    assert names(queue.remove_rid("job-10")) == ["job-10"]
    queue.give_back([taken])
    assert names(queue.remove_rid("job-1")) == ["job-1"]
    assert take_all(queue) == ["job-2", "jo"]


def test_remove_reaches_what_gave_way_and_what_a_sweep_holds():
    queue = queue_of("a", "b", "c")
    queue.give_back(queue.take(1))
    push(queue, "d")
    for name in "abcd":
        assert names(queue.remove_rid(name)) == [name]
    assert len(queue) == 0
    assert queue.take(1) == []


def test_remove_makes_room():
    queue = queue_of("a", "b", capacity=2)
    queue.remove_rid("a")
    assert push(queue, "c")
    assert take_all(queue) == ["b", "c"]


# ---------------------------------------------------------------------- deadlines


def test_the_earliest_deadline_first_across_jobs():
    queue = queue_of()
    for name, deadline_s in [("late", 900.0), ("soon", 60.0), ("none", None), ("mid", 300.0)]:
        push(queue, name, job=f"job of {name}", deadline_s=deadline_s)
    assert take_all(queue) == ["soon", "mid", "late", "none"]


def test_a_missed_deadline_does_not_lose_its_turn():
    queue = queue_of()
    push(queue, "in time", arrived_s=100.0, deadline_s=160.0)
    push(queue, "missed", arrived_s=100.0, deadline_s=90.0)
    assert take_all(queue) == ["missed", "in time"]


def test_deadlines_of_a_job_that_differ_a_little_are_one():
    # A client that gives the time left with each request: prefixes decide, not milliseconds.
    queue = queue_of()
    for i, prefix in enumerate([b"b", b"a", b"b", b"a"]):
        push(queue, f"{prefix.decode()}{i}", prefix=prefix, deadline_s=3600 + i / 1000)
    assert take_all(queue) == ["a1", "a3", "b0", "b2"]


@given(st.floats(0, 1e6), st.floats(1e-3, 1e7))
def test_a_deadline_is_read_a_little_early_and_never_late(arrived_s, left_s):
    queue = queue_of()
    deadline_s = arrived_s + left_s
    push(queue, "a", arrived_s=arrived_s, deadline_s=deadline_s)
    early_s = max((deadline_s - arrived_s) / 16, 1 / 16)
    rate = 1e12  # tokens a second: only the deadline itself can be missed
    assert queue.backlog(deadline_s, rate).at_risk == 1
    assert queue.backlog(deadline_s - 1.01 * early_s - 1e-3, rate).at_risk == 0


# -------------------------------------------------------------- a fair share of jobs


def serve(queue: OfflineQueue, tokens_of: dict[str, int], rounds: int) -> Counter:
    """Keep every job backlogged and serve one request after the other; tokens by job."""
    served: Counter = Counter()
    for i in range(rounds):
        for job, tokens in tokens_of.items():
            while sum(name.startswith(f"{job}-") for name in names(queue)) < 2:
                push(queue, f"{job}-{i}-{len(queue)}", job=job, tokens=tokens)
        (request,) = queue.take(1)
        job = request.name.split("-")[0]
        queue.settle(request, tokens_of[job])
        served[job] += tokens_of[job]
    return served


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_jobs_without_deadlines_get_equal_tokens_whatever_their_prompts(costs):
    served = serve(queue_of(), {f"job{i}": cost for i, cost in enumerate(costs)}, rounds=60)
    shares = [served[f"job{i}"] for i in range(len(costs))]
    assert max(shares) - min(shares) <= max(costs)


def test_an_estimate_that_was_wrong_is_made_good_when_the_request_is_done():
    # "honest" asks for what it takes; "wide" asks for ten times what it takes.
    queue = queue_of()
    for i in range(100):
        push(queue, f"honest-{i}", job="honest", tokens=10)
        push(queue, f"wide-{i}", job="wide", tokens=100)
    taken = Counter()
    for _ in range(100):
        (request,) = queue.take(1)
        queue.settle(request, 10)
        taken[request.name.split("-")[0]] += 1
    assert taken == {"honest": 50, "wide": 50}


def test_a_job_that_comes_late_starts_level_with_the_others():
    queue = queue_of(*(f"first-{i}" for i in range(20)), job="first")
    for request in queue.take(10):
        queue.settle(request, 10)
    for i in range(20):
        push(queue, f"second-{i}", job="second")
    taken = [name.split("-")[0] for name in names(queue.take(20))]
    assert Counter(taken) == {"first": 10, "second": 10}


def test_a_job_that_paused_has_neither_credit_nor_debt():
    queue = queue_of(*(f"a-{i}" for i in range(40)), job="a")
    push(queue, "b-early", job="b")
    first = queue.take(11)  # the one of b among them, which runs on and on
    for request in first:
        if request.name != "b-early":
            queue.settle(request, 10)
    for request in queue.take(10):
        queue.settle(request, 10)
    for i in range(20):
        push(queue, f"b-{i}", job="b")
    taken = [name.split("-")[0] for name in names(queue.take(20))]
    assert Counter(taken) == {"a": 10, "b": 10}


def test_what_gave_way_is_not_charged_twice():
    queue = queue_of(*(f"a-{i}" for i in range(20)), job="a")
    for i in range(20):
        push(queue, f"b-{i}", job="b")
    for _ in range(50):
        preempted = [r for r in queue.take(2) if r.name.startswith("a")]
        queue.give_back(preempted)
        queue.give_back(r for r in queue.taken if r.name.startswith("b"))
    assert Counter(name[0] for name in names(queue.take(20))) == {"a": 10, "b": 10}


def test_a_long_preempted_request_brings_its_job_no_credit_for_the_time_between():
    queue = queue_of("b-first", job="b")
    running = queue.take(1)
    for i in range(60):
        push(queue, f"a-{i}", job="a")
    for request in queue.take(40):
        queue.settle(request, 10)
    queue.give_back(running)
    for i in range(20):
        push(queue, f"b-{i}", job="b")
    taken = names(queue.take(21))
    assert taken[0] == "b-first"
    assert 9 <= sum(name.startswith("a") for name in taken) <= 11


@given(st.floats(0, 1), st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=60))
@settings(max_examples=40, deadline=None)
def test_jobs_without_a_deadline_keep_their_share_beside_deadlines(share, costs):
    queue: OfflineQueue[Request] = OfflineQueue(1000, no_deadline_share=share)
    for i, (dated, undated) in enumerate(costs):
        push(queue, f"dated-{i}", tokens=dated, deadline_s=1e6)
        push(queue, f"undated-{i}", tokens=undated)
    served: Counter = Counter()
    for _ in range(len(costs)):
        (request,) = queue.take(1)
        kind, i = request.name.split("-")
        served[kind] += costs[int(i)][kind == "undated"]
        queue.settle(request, costs[int(i)][kind == "undated"])
        total = served["dated"] + served["undated"]
        assert share * total - 50 <= served["undated"] <= share * total + 50


def test_without_a_share_deadlines_go_first():
    queue: OfflineQueue[Request] = OfflineQueue(10, no_deadline_share=0.0)
    push(queue, "undated")
    push(queue, "dated", deadline_s=1e6)
    push(queue, "dated too", deadline_s=1e6)
    assert take_all(queue) == ["dated", "dated too", "undated"]


# ------------------------------------------------------------- prefixes within a job


@given(st.permutations([f"{group}{i}" for group in "abcdef" for i in range(5)]))
@settings(max_examples=30, deadline=None)
def test_prompts_with_a_common_prefix_follow_each_other(order):
    queue = queue_of()
    for name in order:
        push(queue, name, prefix=name[0].encode())
    taken = take_all(queue)
    assert len(list(groupby(taken, key=lambda name: name[0]))) == 6
    for _, group in groupby(taken, key=lambda name: name[0]):
        members = list(group)
        assert members == [name for name in order if name in members]  # in order of arrival


@given(st.integers(1, 30), st.lists(st.binary(min_size=1, max_size=2), min_size=200))
@settings(max_examples=30, deadline=None)
def test_no_request_is_overtaken_for_ever(length, prefixes):
    # A steady stream that holds `length` requests waiting, most of them with favoured prefixes.
    queue: OfflineQueue[Request] = OfflineQueue(1000)
    pushed_at = {}
    for i, prefix in enumerate(prefixes):
        push(queue, str(i), prefix=prefix)
        pushed_at[str(i)] = i
        if len(queue) > length:
            (request,) = queue.take(1)
            queue.settle(request, 10)
            assert i - pushed_at[request.name] <= 2 * (length + 1)


def test_a_sweep_keeps_its_order_over_hundreds_of_requests():
    queue = queue_of(capacity=2000)
    for i in range(1500):
        push(queue, f"{i:04}", prefix=bytes([i % 7]))
    expected = sorted((f"{i:04}" for i in range(1500)), key=lambda n: (int(n) % 7, n))
    assert [names(queue.take(1))[0] for _ in range(1500)] == expected


TOKENS = st.lists(st.integers(0, 200_000), max_size=5 * PREFIX_BLOCK_TOKENS)


@given(TOKENS, TOKENS, TOKENS)
def test_a_prefix_key_starts_alike_for_prompts_that_do(common, one, other):
    blocks = len(common) // PREFIX_BLOCK_TOKENS
    keys = prefix_key(common + one), prefix_key(array("q", common + other))
    assert keys[0][: 4 * blocks] == keys[1][: 4 * blocks] == prefix_key(common)[: 4 * blocks]
    assert len(keys[0]) == 4 * ((len(common) + len(one)) // PREFIX_BLOCK_TOKENS)


def test_a_prefix_key_tells_prompts_apart_from_the_first_block_that_differs_on():
    block = list(range(PREFIX_BLOCK_TOKENS))
    one, other = prefix_key(block + block + block), prefix_key(block + block[::-1] + block)
    assert one[:4] == other[:4]
    assert one[4:8] != other[4:8]
    assert one[8:] != other[8:]


def test_a_prefix_key_is_bounded_and_knows_its_namespace():
    assert len(prefix_key(range(100_000))) == len(prefix_key(range(1_000_000))) == 256
    assert prefix_key([]) == prefix_key([], "tenant") == b""
    assert prefix_key(range(64), "tenant") != prefix_key(range(64))


# ------------------------------------------------------------- adapters within a job


def none_may(_adapter: str) -> bool:
    return False


@given(st.permutations([f"{adapter}{group}" for adapter in "abc" for group in "vwxyz"]))
@settings(max_examples=30, deadline=None)
def test_requests_of_an_adapter_follow_each_other_and_those_of_a_prefix_in_it(order):
    queue = queue_of()
    for name in order:
        push(queue, name, adapter=name[0], prefix=name[1].encode())
    assert take_all(queue) == sorted(order)


def test_those_whose_adapter_may_not_run_are_passed_over():
    queue = queue_of()
    for name in ("a1", "b1", "a2", "c1", "b2"):
        push(queue, name, adapter=name[0])
    (a1,) = queue.take(1)
    assert names(queue.take(9, lambda adapter: adapter != "b")) == ["a2", "c1"]
    push(queue, "a3", adapter="a")
    queue.give_back([a1])
    assert names(queue.take(1, lambda adapter: adapter == "b")) == ["b1"]
    assert queue.take(9, none_may) == []
    assert take_all(queue) == ["a1", "b2", "a3"]


def test_each_answer_is_for_one_that_is_taken_at_once():
    queue = queue_of()
    for name in ("a1", "a2", "b1", "b2"):
        push(queue, name, adapter=name[0])
    yes: list[str] = []

    def one_of_each(adapter: str) -> bool:
        if adapter in yes:
            return False
        yes.append(adapter)
        return True

    assert names(queue.take(4, one_of_each)) == ["a1", "b1"] == [f"{name}1" for name in yes]


def test_another_job_or_one_without_a_deadline_runs_meanwhile():
    queue = queue_of()
    push(queue, "soon", adapter="a", deadline_s=10.0)
    push(queue, "later", adapter="b", deadline_s=1000.0)
    push(queue, "whenever", adapter="c", job="j")
    assert names(queue.take(1, lambda adapter: adapter != "a")) == ["later"]
    assert names(queue.take(1, lambda adapter: adapter == "c")) == ["whenever"]
    assert take_all(queue) == ["soon"]


def test_who_runs_next_is_known_among_those_that_may():
    queue = queue_of()
    for name in ("a", "b", "c"):
        push(queue, name, adapter=name)
    a, b = queue.take(2)
    queue.give_back([a, b])
    assert queue.next_that_gave_way(lambda adapter: adapter != "a") is b
    assert queue.next_that_gave_way(lambda adapter: adapter == "c") is None
    assert queue.next_that_gave_way(none_may) is None


# ------------------------------------------------------------------------ the backlog


def test_an_empty_backlog():
    assert queue_of().backlog(5.0, None) == Backlog(
        requests=0, tokens=0, jobs=0, oldest_wait_s=0.0, at_risk=0
    )


def test_the_backlog_counts_what_waits():
    queue = queue_of("a", tokens=30, arrived_s=1.0, job="x")
    push(queue, "b", tokens=20, arrived_s=2.0, job="x", deadline_s=1e6)
    push(queue, "c", tokens=10, arrived_s=3.0, job="y")
    assert queue.backlog(10.0, None) == Backlog(
        requests=3, tokens=60, jobs=2, oldest_wait_s=9.0, at_risk=0
    )
    (taken,) = queue.take(1)
    assert taken.name == "b"
    assert queue.backlog(10.0, None).oldest_wait_s == 9.0
    queue.remove_rid("a")
    assert queue.backlog(10.0, None).oldest_wait_s == 7.0
    queue.give_back([taken])
    assert queue.backlog(10.0, None).oldest_wait_s == 8.0


@pytest.mark.parametrize(
    ("now_s", "tokens_per_s", "at_risk"),
    [
        pytest.param(0.0, 10.0, 0, id="fast enough"),
        pytest.param(0.0, 2.0, 1, id="the second job would be late in part"),
        pytest.param(0.0, 0.5, 7, id="the first one too"),
        pytest.param(0.0, None, 0, id="nobody knows how fast"),
        pytest.param(70.0, None, 4, id="what is late already is late at any rate"),
        pytest.param(70.0, 1e9, 4, id="however fast"),
    ],
)
def test_requests_whose_deadline_is_at_risk(now_s, tokens_per_s, at_risk):
    queue = queue_of()
    for i in range(4):
        push(queue, f"first-{i}", tokens=20, deadline_s=64.0)  # 80 tokens in 64 s
    for i in range(4):
        push(queue, f"second-{i}", tokens=50, deadline_s=128.0)  # 280 in 128 s
    push(queue, "never at risk", tokens=10_000)
    assert queue.backlog(now_s, tokens_per_s).at_risk == at_risk


# ------------------------------------------------- numbers that nobody would have meant

ANY_FLOAT = st.floats() | st.integers() | st.integers(10**300, 10**310).map(lambda n: -n)


@settings(max_examples=300)
@example(  # for ever at no rate at all
    items=[{"tokens": 92, "deadline_s": 0.0}], now_s=-inf, tokens_per_s=0.0, settled=0
)
@given(
    items=st.lists(
        st.builds(
            dict,
            tokens=st.integers(1) | st.integers(10**300, 10**310),
            arrived_s=ANY_FLOAT,
            deadline_s=st.none() | ANY_FLOAT,
            job=st.sampled_from(["a", "b"]),
        ),
        min_size=1,
        max_size=6,
    ),
    now_s=st.floats(),
    tokens_per_s=st.none() | st.floats(0) | st.just(5e-324),
    settled=st.integers() | st.integers(10**300, 10**310),
)
def test_no_number_raises_and_nothing_is_lost(items, now_s, tokens_per_s, settled):
    queue: OfflineQueue[Request] = OfflineQueue(100, no_deadline_share=0.1)
    pushed = {push(queue, f"r{i}", **item) for i, item in enumerate(items)}
    backlog = queue.backlog(now_s, tokens_per_s)
    assert 0 <= backlog.at_risk <= backlog.requests == len(items)
    queue.give_back(queue.take(2))
    taken = queue.take(len(items))
    assert set(taken) == pushed
    for request in taken:
        assert queue.settle(request, settled) is not None
    assert not queue._lanes


def test_deadlines_beyond_all_bounds_keep_their_order():
    queue: OfflineQueue[Request] = OfflineQueue(100)
    for name, deadline_s in (("late", 1e308), ("soon", 50.0), ("past", -1e308), ("never", None)):
        assert push(queue, name, arrived_s=10.0, deadline_s=deadline_s)
    assert take_all(queue) == ["past", "soon", "late", "never"]


@pytest.mark.parametrize("left_s", [5e-324, 1e-9, 0.5])
def test_a_deadline_of_a_moment_is_a_deadline(left_s):
    queue = queue_of("whenever")
    push(queue, "now", arrived_s=1000.0, deadline_s=1000.0 + left_s)
    assert take_all(queue) == ["now", "whenever"]


# ------------------------------------------------------------------- random traffic

ITEMS = st.builds(
    dict,
    tokens=st.integers(1, 100),
    job=st.sampled_from(["", "a", "b"]),
    deadline_s=st.sampled_from([None, None, 10.0, 500.0, 500.1]),
    prefix=st.sampled_from([b"", b"x", b"y", b"xz"]),
    adapter=st.sampled_from(["", "", "a", "b"]),
)


class QueueBesideSets(RuleBasedStateMachine):
    """Every request is in exactly one place, and what is first is first by the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: OfflineQueue[Request] = OfflineQueue(8, no_deadline_share=0.25)
        self.items: dict[str, OfflineItem] = {}
        self.waiting: dict[str, Request] = {}
        self.taken: dict[str, Request] = {}
        self.gone: set[str] = set()
        self.made = 0

    @rule(item=ITEMS)
    def push(self, item):
        self.made += 1
        request = Request(f"r{self.made}")
        item = OfflineItem(rid=request.name, arrived_s=float(self.made), **item)
        self.items[request.name] = item
        accepted = self.queue.push(request, item)
        assert accepted == (len(self.waiting) < 8)
        if accepted:
            self.waiting[request.name] = request
        else:
            self.gone.add(request.name)

    @rule(n=st.integers(0, 6))
    def take(self, n):
        expected = min(n, len(self.waiting))
        taken = self.queue.take(n)
        assert len(taken) == expected
        for request in taken:
            self.taken[request.name] = self.waiting.pop(request.name)
        dated = [self.items[r.name].deadline_s for r in taken if self.items[r.name].deadline_s]
        assert dated == sorted(dated) or len(set(dated) - {10.0}) > 1  # 500.0 and 500.1 are one
        left = [self.items[name].deadline_s or 1e9 for name in self.waiting]
        if dated and left:
            assert max(dated) <= min(left) + 0.1

    @rule(n=st.integers(0, 6), adapters=st.sets(st.sampled_from(["", "a", "b"])))
    def take_some(self, n, adapters):
        may_run = [name for name in self.waiting if self.items[name].adapter in adapters]
        taken = names(self.queue.take(n, adapters.__contains__))
        assert len(taken) == min(n, len(may_run))
        assert set(taken) <= set(may_run)
        for name in taken:
            self.taken[name] = self.waiting.pop(name)

    @rule(data=st.data())
    def give_back(self, data):
        back = data.draw(st.lists(st.sampled_from(sorted(self.taken) or [""]), unique=True))
        self.queue.give_back(self.taken[name] for name in back if name)
        for name in filter(None, back):
            self.waiting[name] = self.taken.pop(name)

    @rule(n=st.integers(1, 20))
    def looking_changes_nothing(self, n):
        before = self.queue.take(n)
        self.queue.give_back(before)
        again = self.queue.take(n)
        self.queue.give_back(again)
        assert names(again) == names(before)

    @rule(data=st.data(), tokens=st.integers(0, 300))
    def settle(self, data, tokens):
        name = data.draw(st.sampled_from(sorted(self.taken) or [""]))
        if name:
            assert self.queue.settle(self.taken[name], tokens) is self.items[name]
            assert self.queue.settle(self.taken.pop(name), tokens) is None
            self.gone.add(name)

    @rule(digit=st.integers(1, 9), by_id=st.booleans())
    def remove(self, digit, by_id):
        prefix = f"r{digit}"
        removed = (
            self.queue.remove_rid(prefix)
            if by_id
            else self.queue.remove(lambda request: request.name.startswith(prefix))
        )
        matching = [n for n in self.waiting if n == prefix or (n.startswith(prefix) and not by_id)]
        assert names(removed) == sorted(matching, key=lambda name: int(name[1:]))
        for name in matching:
            del self.waiting[name]
            self.gone.add(name)

    @invariant()
    def every_request_is_in_exactly_one_place(self):
        assert sorted(names(self.queue)) == sorted(self.waiting)
        assert len(self.queue) == len(self.waiting)
        assert sorted(names(self.queue.taken)) == sorted(self.taken)
        assert len(self.waiting) + len(self.taken) + len(self.gone) == self.made

    @invariant()
    def the_backlog_is_what_waits(self):
        waiting = [self.items[name] for name in self.waiting]
        backlog = self.queue.backlog(1000.0, None)
        assert backlog.requests == len(waiting)
        assert backlog.tokens == sum(item.tokens for item in waiting)
        assert backlog.jobs == len({item.job for item in waiting})
        assert backlog.oldest_wait_s == max((1000.0 - i.arrived_s for i in waiting), default=0.0)
        assert backlog.at_risk == sum(item.deadline_s is not None for item in waiting)

    @invariant()
    def nothing_is_kept_of_what_is_gone(self):
        if not self.waiting and not self.taken:
            assert not self.queue._lanes
            assert not self.queue._rids
            assert not self.queue._never_taken

    def teardown(self):
        """Whatever happened, everything that waits can be taken, once."""
        assert sorted(names(self.queue.take(100))) == sorted(self.waiting)


TestRandomTraffic = QueueBesideSets.TestCase
TestRandomTraffic.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
