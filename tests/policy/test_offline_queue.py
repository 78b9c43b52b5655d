"""The offline backlog: its order, its bound, and that it neither loses nor repeats a request."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from conserve_sgl.policy import OfflineQueue


def queue_of(*items: str, capacity: int = 10) -> OfflineQueue[str]:
    queue: OfflineQueue[str] = OfflineQueue(capacity)
    for item in items:
        assert queue.push(item)
    return queue


def test_first_come_first_served():
    assert queue_of("a", "b", "c").take(2) == ["a", "b"]


@pytest.mark.parametrize(
    ("n", "taken", "left"),
    [
        pytest.param(0, [], ["a", "b"], id="nothing asked, nothing taken"),
        pytest.param(1, ["a"], ["b"], id="one of two"),
        pytest.param(2, ["a", "b"], [], id="all of it"),
        pytest.param(9, ["a", "b"], [], id="more than there is"),
    ],
)
def test_take(n, taken, left):
    queue = queue_of("a", "b")
    assert queue.take(n) == taken
    assert list(queue) == left


def test_take_from_an_empty_queue():
    assert queue_of().take(3) == []


def test_what_is_given_back_runs_first_and_in_its_order():
    queue = queue_of("a", "b", "c", "d")
    queue.give_back(queue.take(3))
    assert list(queue) == ["a", "b", "c", "d"]


def test_a_preempted_request_comes_before_every_newer_one():
    queue = queue_of("newer")
    queue.give_back(["preempted"])
    assert queue.take(1) == ["preempted"]


def test_give_back_takes_any_iterable():
    queue = queue_of("c")
    queue.give_back(item for item in "ab")
    assert list(queue) == ["a", "b", "c"]


def test_give_back_of_nothing():
    queue = queue_of("a")
    queue.give_back([])
    assert list(queue) == ["a"]


def test_a_full_queue_refuses_and_stays_as_it_was():
    queue = queue_of("a", "b", capacity=2)
    assert queue.is_full
    assert not queue.push("c")
    assert list(queue) == ["a", "b"]


def test_a_full_queue_takes_back_what_it_had_accepted():
    queue = queue_of("a", "b", capacity=2)
    taken = queue.take(1)
    assert queue.push("c")
    queue.give_back(taken)
    assert list(queue) == ["a", "b", "c"]
    assert queue.is_full
    assert not queue.push("d")


def test_a_queue_above_its_capacity_refuses_until_it_is_below_it():
    queue = queue_of("a", capacity=1)
    queue.give_back(["x"])
    assert queue.take(1) == ["x"]
    assert not queue.push("b")
    assert queue.take(1) == ["a"]
    assert queue.push("b")


def test_remove_returns_the_matches_in_order_and_keeps_the_rest_in_order():
    queue = queue_of("a1", "b1", "a2", "b2", "a3")
    assert queue.remove(lambda rid: rid.startswith("a")) == ["a1", "a2", "a3"]
    assert list(queue) == ["b1", "b2"]


def test_remove_without_a_match():
    queue = queue_of("a", "b")
    assert queue.remove(lambda _rid: False) == []
    assert list(queue) == ["a", "b"]


def test_remove_makes_room():
    queue = queue_of("a", "b", capacity=2)
    queue.remove(lambda rid: rid == "a")
    assert queue.push("c")
    assert list(queue) == ["b", "c"]


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_queue_without_room_is_refused(capacity):
    with pytest.raises(ValueError, match="at least one request"):
        OfflineQueue(capacity)


class QueueBesideAList(RuleBasedStateMachine):
    """Random traffic; a plain list says what the queue must hold."""

    outside = Bundle("outside")

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 5
        self.queue: OfflineQueue[int] = OfflineQueue(self.capacity)
        self.inside: list[int] = []
        self.refused: set[int] = set()
        self.left: set[int] = set()
        self.made = 0

    @rule()
    def push(self):
        self.made += 1
        accepted = self.queue.push(self.made)
        assert accepted == (len(self.inside) < self.capacity)
        (self.inside.append if accepted else self.refused.add)(self.made)

    @rule(target=outside, n=st.integers(0, 8))
    def take(self, n):
        taken = self.queue.take(n)
        expected, self.inside = self.inside[:n], self.inside[n:]
        assert taken == expected
        self.left.update(taken)
        return multiple(*taken)

    @rule(items=st.lists(outside, unique=True, max_size=4))
    def give_back(self, items):
        items = [item for item in items if item in self.left]
        self.queue.give_back(items)
        self.inside = items + self.inside
        self.left.difference_update(items)

    @rule(divisor=st.integers(1, 4))
    def remove(self, divisor):
        removed = self.queue.remove(lambda item: item % divisor == 0)
        assert removed == [item for item in self.inside if item % divisor == 0]
        self.inside = [item for item in self.inside if item % divisor]
        self.left.update(removed)

    @invariant()
    def holds_what_the_list_holds(self):
        assert list(self.queue) == self.inside
        assert len(self.queue) == len(self.inside)
        assert self.queue.is_full == (len(self.inside) >= self.capacity)

    @invariant()
    def every_request_is_in_exactly_one_place(self):
        places = [*self.queue, *self.left, *self.refused]
        assert sorted(places) == list(range(1, self.made + 1))


TestRandomTraffic = QueueBesideAList.TestCase
TestRandomTraffic.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
