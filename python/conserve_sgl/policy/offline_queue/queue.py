"""The queue: its bound, and the account of each request from `push` to `settle`.

A push costs a sorted insertion, a take a few operations; nothing is ever sorted as a whole.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from conserve_sgl.policy.offline_queue.backlog import Backlog, at_risk
from conserve_sgl.policy.offline_queue.eta import JobBacklog, job_backlogs
from conserve_sgl.policy.offline_queue.item import OfflineItem, bounded, bounded_tokens
from conserve_sgl.policy.offline_queue.lane import Entry, Lane, MayRun
from conserve_sgl.policy.offline_queue.lanes import Lanes

__all__ = ["OfflineQueue"]

T = TypeVar("T")


def _all_may(_adapter: str) -> bool:
    return True


class OfflineQueue(Generic[T]):
    """A bounded queue of offline requests, opaque to it.

    A request is pushed, and then either taken or removed. One that was taken is either given back
    or settled: the queue keeps account of it until then.

    Args:
        capacity: requests that may wait; those that were accepted before and come back count, but
            are never refused.
        no_deadline_share: of the tokens served while requests with and without a deadline wait,
            the share of the latter, 0 to 1; short of it by at most one request.
    """

    def __init__(self, capacity: int, *, no_deadline_share: float = 0.0) -> None:
        if capacity < 1:
            raise ValueError(f"an OfflineQueue holds at least one request, not {capacity}")
        self.capacity = capacity
        self._lanes = Lanes(no_deadline_share)
        self._taken: dict[int, Entry[T]] = {}  # by id of the request
        self._rids: list[tuple[str, int, Entry[T]]] = []  # of all that wait or are taken, sorted
        self._never_taken: dict[int, float] = {}  # arrival by order: the oldest is first
        self._waiting = 0
        self._pushed = 0
        self._turns = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[T]:
        """What waits, job by job."""
        return (entry.of for lane in self._lanes for entry in lane)

    @property
    def is_full(self) -> bool:
        """Whether the next `push` would be refused."""
        return self._waiting >= self.capacity

    @property
    def taken(self) -> list[T]:
        """What was taken and neither given back nor settled."""
        return [entry.of for entry in self._taken.values()]

    def push(self, request: T, item: OfflineItem) -> bool:
        """Add a new request; False, and nothing changes, when the queue is full."""
        if self.is_full:
            return False
        self._pushed += 1
        item = bounded(item)
        lane = self._lanes.lane_of(item, self._pushed)
        entry = Entry(request, item, self._pushed, lane)
        insort(self._rids, (item.rid, entry.order, entry))
        self._never_taken[entry.order] = item.arrived_s
        if not lane.holds_new:
            self._lanes.level(lane)
        lane.push(entry)
        self._entered(lane)
        return True

    def next_that_gave_way(self, may_run: MayRun = _all_may) -> T | None:
        """What `take` would return first, if it was taken before and given back; else None."""
        entry = self._first(may_run)
        return entry.of if entry is not None and entry.turn else None

    def take(self, n: int, may_run: MayRun = _all_may) -> list[T]:
        """Remove and return up to `n` requests, in the order in which they should run.

        Args:
            may_run: asked for adapters before each is taken; those of others are passed over.
        """
        requests = []
        while len(requests) < n and (entry := self._first(may_run)) is not None:
            self._take(entry)
            requests.append(entry.of)
        return requests

    def give_back(self, requests: Iterable[T]) -> None:
        """Put requests that were taken back in front of their lanes, in the order of their turns.

        Never refuses. What their job was charged is returned to it.

        Raises:
            KeyError: one of them is not out.
        """
        for request in requests:
            entry = self._taken.pop(id(request))
            self._lanes.charge(entry, -entry.item.tokens)
            entry.lane.went_out(entry, -1)
            entry.lane.give_back(entry)
            self._entered(entry.lane)

    def settle(self, request: T, tokens: int) -> OfflineItem | None:
        """A request that was taken is done and took so many tokens: correct its job's account.

        Returns:
            What was pushed with it, within bounds, or None when it was not out.
        """
        entry = self._taken.pop(id(request), None)
        if entry is None:
            return None
        self._lanes.charge(entry, bounded_tokens(tokens) - entry.item.tokens)
        entry.lane.went_out(entry, -1)
        entry.lane.finished += 1
        self._forget(entry)
        self._lanes.forget_if_idle(entry.lane)
        return entry.item

    def remove(self, matches: Callable[[T], bool]) -> list[T]:
        """Remove and return, in order of arrival, every waiting request that `matches`."""
        entries = [entry for lane in self._lanes for entry in lane if matches(entry.of)]
        return self._remove(entries)

    def remove_rid(self, rid: str) -> list[T]:
        """The same for the requests of that id, without looking at every request."""
        at = bisect_left(self._rids, (rid,))
        named = []
        while at < len(self._rids) and self._rids[at][0] == rid:
            named.append(self._rids[at][2])
            at += 1
        return self._remove([entry for entry in named if id(entry.of) not in self._taken])

    def _remove(self, entries: list[Entry[T]]) -> list[T]:
        for entry in entries:
            lane = entry.lane
            lane.remove(entry)
            self._waiting -= 1
            self._forget(entry)
            self._lanes.left(lane)
            self._lanes.forget_if_idle(lane)
        return [entry.of for entry in sorted(entries, key=lambda entry: entry.order)]

    def backlog(self, now_s: float, tokens_per_s: float | None) -> Backlog:
        """The queue as it is.

        Args:
            now_s: on the clock of the items.
            tokens_per_s: how fast tokens, as items expect them, are being served; None when
                nobody knows, and then only what is late already is at risk. At least 0.
        """
        waiting = [lane for lane in self._lanes if lane.waiting]
        return Backlog(
            requests=self._waiting,
            tokens=sum(lane.waiting_tokens for lane in waiting),
            jobs=len({lane.key[0] for lane in waiting}),
            oldest_wait_s=self._oldest_wait_s(now_s),
            at_risk=at_risk(self._lanes.dated, now_s, tokens_per_s),
        )

    def jobs(self, tokens_per_s: float | None) -> list[JobBacklog]:
        """Every job that has a request here, those that are done first first.

        Args:
            tokens_per_s: as for `backlog`; None leaves out when each is done.
        """
        return job_backlogs(self._lanes, tokens_per_s, self._lanes.share)

    def _oldest_wait_s(self, now_s: float) -> float:
        arrivals = [e.item.arrived_s for lane in self._lanes for e in lane.gave_way]
        arrivals.append(next(iter(self._never_taken.values()), now_s))
        return max(0.0, now_s - min(arrivals))

    # ----------------------------------------------------------------- one request

    def _first(self, may_run: MayRun) -> Entry[T] | None:
        firsts = (lane.first(may_run) for lane in self._lanes.in_turn)
        return next((entry for entry in firsts if entry is not None), None)

    def _take(self, entry: Entry[T]) -> None:
        entry.contended, lane = self._lanes.contended, entry.lane
        lane.take(entry)
        self._lanes.left(lane)
        if not entry.turn:
            self._turns += 1
            entry.turn = self._turns
        lane.went_out(entry, 1)
        self._never_taken.pop(entry.order, None)
        self._waiting -= 1
        self._lanes.charge(entry, entry.item.tokens)
        self._taken[id(entry.of)] = entry

    def _entered(self, lane: Lane) -> None:
        self._waiting += 1
        self._lanes.entered(lane)

    def _forget(self, entry: Entry[T]) -> None:
        del self._rids[bisect_left(self._rids, (entry.item.rid, entry.order))]
        self._never_taken.pop(entry.order, None)
