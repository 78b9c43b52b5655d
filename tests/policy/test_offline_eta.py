"""The queue by job, and when each is done at a rate."""

from __future__ import annotations

import pytest

from conserve_sgl.policy import OfflineItem, OfflineQueue


class Request:
    """Stands where a request does."""


def queue_of(*jobs: tuple[str, int, float | None], share: float = 0.0) -> OfflineQueue:
    """A queue with one request of so many tokens for each (job, tokens, deadline)."""
    queue: OfflineQueue = OfflineQueue(100, no_deadline_share=share)
    for number, (job, tokens, deadline_s) in enumerate(jobs):
        item = OfflineItem(rid=str(number), tokens=tokens, job=job, deadline_s=deadline_s)
        assert queue.push(Request(), item)
    return queue


def done(queue: OfflineQueue, tokens_per_s: float | None = 10.0) -> dict[str, float | None]:
    return {job.job: job.done_in_s for job in queue.jobs(tokens_per_s)}


def test_jobs_without_a_deadline_share_the_engine_evenly():
    """Two of 100 and 300 tokens: 100 each take 20 s of 10 a second, and the rest 20 s more."""
    assert done(queue_of(("short", 100, None), ("long", 300, None))) == {"short": 20, "long": 40}


def test_deadlines_go_first_the_earliest_before_the_others():
    queue = queue_of(("later", 100, 900.0), ("none", 50, None), ("sooner", 200, 100.0))
    assert done(queue) == {"sooner": 20, "later": 30, "none": 35}
    assert list(done(queue)) == ["sooner", "later", "none"]


def test_beside_deadlines_the_others_get_their_share():
    """Of 10 a second 2 go to `none` for 25 s, and all of them after that."""
    queue = queue_of(("dated", 200, 900.0), ("none", 100, None), share=0.2)
    assert done(queue) == pytest.approx({"dated": 25, "none": 30})


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_whatever_the_order_all_is_done_when_all_tokens_are_served(share):
    queue = queue_of(("a", 70, 900.0), ("b", 90, None), ("c", 140, None), share=share)
    assert max(done(queue).values()) == pytest.approx(30)


def test_a_job_is_one_whatever_its_requests_deadlines_are():
    queue = queue_of(("a", 100, 900.0), ("a", 100, 10.0), ("a", 100, None))
    (job,) = queue.jobs(10.0)
    assert (job.waiting, job.running, job.waiting_tokens) == (3, 0, 300)
    assert job.deadline_s == 10.0
    assert job.done_in_s == 30


def test_what_runs_is_half_done_and_what_is_done_is_counted():
    queue = queue_of(("a", 100, None), ("a", 100, None), ("a", 100, None))
    first, second = queue.take(2)
    queue.settle(first, 120)
    (job,) = queue.jobs(10.0)
    assert (job.waiting, job.running, job.finished) == (1, 1, 1)
    assert job.done_in_s == 15
    queue.give_back([second])
    (job,) = queue.jobs(10.0)
    assert (job.waiting, job.running, job.done_in_s) == (2, 0, 20)


@pytest.mark.parametrize("rate", [None, 0.0])
def test_nobody_knows_when_without_a_rate(rate):
    assert done(queue_of(("a", 100, None)), rate) == {"a": None}


def test_an_empty_queue_has_no_jobs():
    assert queue_of().jobs(10.0) == []
