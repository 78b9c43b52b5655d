"""The offline backlog, beside SGLang's waiting queue and bounded: which request runs next.

Requests wait in lanes, one for each job and deadline. Three rules choose, in this order:

1. Between lanes with a deadline: the earliest one first, a request that has missed its own
   included. Of what both kinds are served while both wait, lanes without a deadline get
   `no_deadline_share`.
2. Between lanes without a deadline: the one that was served the fewest tokens, so that jobs get
   equal shares of the engine whatever the length of their prompts (start-time fair queueing; a
   job that had nothing waiting starts level with the others, with neither credit nor debt).
3. Within a lane: what gave way first, in the order of their first turns, so that none waits for
   others that began later; then sweep by sweep in the order of the prompts' first
   tokens, so that prompts with a common prefix follow each other and find it in the radix tree.
   A request that comes during a sweep waits for the next one, so none is overtaken for ever.

A deadline is read to within a sixteenth of the time that it left on arrival, never later: clients
give the time that is left, request by request, and a job must not fall apart into as many lanes.

A push costs a sorted insertion, a take a few operations; nothing is ever sorted as a whole.

No number that a request carries can raise here: this runs in the scheduler, and what raises there
ends the server. Times and tokens beyond what anybody means are brought within `_bounded`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from math import ceil, floor, frexp, inf, isnan, ldexp
from typing import Generic, TypeVar
from zlib import crc32

import msgspec

__all__ = ["Backlog", "OfflineItem", "OfflineQueue", "prefix_key"]

T = TypeVar("T")

PREFIX_BLOCK_TOKENS = 64
PREFIX_TOKENS = 4096
_SERVED_KEPT = 256
_MOST_S = 1e12
_MOST_TOKENS = 10**12


def prefix_key(tokens: Sequence[int], namespace: str = "") -> bytes:
    """A key that sorts prompts with a common prefix next to each other.

    Four bytes for each full block of PREFIX_BLOCK_TOKENS tokens, up to PREFIX_TOKENS; each is a
    checksum of all tokens up to the end of its block. A collision costs a cache hit, nothing else.

    Args:
        tokens: the prompt.
        namespace: prompts of different namespaces share nothing (SGLang's `extra_key`).
    """
    blocks = min(len(tokens), PREFIX_TOKENS) // PREFIX_BLOCK_TOKENS
    view = memoryview(array("q", tokens[: blocks * PREFIX_BLOCK_TOKENS])).cast("B")
    block_bytes = 8 * PREFIX_BLOCK_TOKENS
    checksum = crc32(namespace.encode())
    checksums = array("I")
    for start in range(0, len(view), block_bytes):
        checksum = crc32(view[start : start + block_bytes], checksum)
        checksums.append(checksum)
    return checksums.tobytes()


class OfflineItem(msgspec.Struct, frozen=True, kw_only=True):
    """What the queue knows of a request.

    Args:
        rid: its id, by which it may be removed.
        tokens: prompt and output tokens that it is expected to take, at least 1.
        arrived_s: when the server received it, on the clock of `deadline_s`.
        job: the job it belongs to; requests without a name are one job, "".
        deadline_s: when it should be done, or None.
        prefix: `prefix_key` of its prompt.
    """

    rid: str
    tokens: int
    arrived_s: float = 0.0
    job: str = ""
    deadline_s: float | None = None
    prefix: bytes = b""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a request takes at least one token: {self}")


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """The queue at a moment, for metrics.

    Args:
        requests: waiting.
        tokens: that they are expected to take.
        jobs: that have a request waiting.
        oldest_wait_s: since the arrival of the request that arrived first; 0.0 when none waits.
        at_risk: waiting requests that will miss their deadline, served earliest deadline first
            at the rate asked about.
    """

    requests: int
    tokens: int
    jobs: int
    oldest_wait_s: float
    at_risk: int


def _bounded(item: OfflineItem) -> OfflineItem:
    """The item with numbers that can be reckoned with, nearly always itself.

    A time that is no number is that of an item which says nothing: arrived at 0, no deadline.
    """
    tokens, arrived_s = min(item.tokens, _MOST_TOKENS), _time(item.arrived_s) or 0.0
    deadline_s = None if item.deadline_s is None else _time(item.deadline_s)
    if (tokens, arrived_s, deadline_s) == (item.tokens, item.arrived_s, item.deadline_s):
        return item
    return msgspec.structs.replace(item, tokens=tokens, arrived_s=arrived_s, deadline_s=deadline_s)


def _time(seconds: float) -> float | None:
    within_s = _within(seconds, _MOST_S)
    return None if isnan(within_s) else within_s


def _within(number: float, most: float) -> float:
    return min(max(number, -most), most)


def _coarse(item: OfflineItem) -> float | None:
    """The deadline, brought forward by at most a sixteenth of the time left on arrival."""
    if item.deadline_s is None:
        return None
    left_s = max(item.deadline_s - item.arrived_s, 1.0)
    grain_s = ldexp(1.0, frexp(left_s)[1] - 5)  # a power of two, left_s / 32 < grain <= left_s / 16
    return floor(item.deadline_s / grain_s) * grain_s


class _Entry(Generic[T]):
    """A request of the queue, waiting or taken."""

    __slots__ = ("contended", "item", "lane", "of", "order", "turn")

    def __init__(self, of: T, item: OfflineItem, order: int, lane: _Lane) -> None:
        self.of = of
        self.item = item
        self.order = order
        self.lane = lane
        self.contended = False  # whether lanes of both kinds waited when it was taken
        self.turn = 0  # when it was taken first, counted in requests; 0 before

    def __lt__(self, other: _Entry) -> bool:
        return (self.item.prefix, self.order) < (other.item.prefix, other.order)


def _turn(entry: _Entry) -> int:
    return entry.turn


class _Sweep:
    """Requests sorted by prefix, then arrival, and how far it has been served."""

    __slots__ = ("_entries", "_served")

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._served = 0

    def __len__(self) -> int:
        return len(self._entries) - self._served

    def __iter__(self) -> Iterator[_Entry]:
        return islice(self._entries, self._served, None)

    def add(self, entry: _Entry) -> None:
        insort(self._entries, entry, lo=self._served)

    def discard(self, entry: _Entry) -> bool:
        """Whether it was there."""
        at = bisect_left(self._entries, entry, lo=self._served)
        if at == len(self._entries) or self._entries[at] is not entry:
            return False
        del self._entries[at]
        return True

    def pop(self) -> _Entry:
        entry = self._entries[self._served]
        self._served += 1
        if self._served == _SERVED_KEPT:  # moving all the others up for each would cost more
            del self._entries[:_SERVED_KEPT]
            self._served = 0
        return entry


class _Lane:
    """The requests of one job that have one deadline, or none."""

    __slots__ = (
        "deadline_s",
        "gave_way",
        "gave_way_tokens",
        "key",
        "next_sweep",
        "out",
        "served_tokens",
        "sweep",
        "tie",
        "waiting",
        "waiting_tokens",
    )

    def __init__(self, key: tuple[str, float | None], tie: int) -> None:
        self.key = key
        self.deadline_s = key[1]
        self.tie = tie
        self.served_tokens = 0
        self.out = 0
        self.waiting = 0
        self.waiting_tokens = 0
        self.gave_way_tokens = 0
        self.gave_way: list[_Entry] = []  # by turn
        self.sweep = _Sweep()
        self.next_sweep = _Sweep()

    @property
    def holds_new(self) -> bool:
        """Whether a request waits that was never taken."""
        return bool(self.sweep or self.next_sweep)

    @property
    def rank(self) -> tuple[float, int]:
        """Lanes of one kind are served in this order."""
        return (self.served_tokens if self.deadline_s is None else self.deadline_s, self.tie)

    def __iter__(self) -> Iterator[_Entry]:
        return chain(self.gave_way, self.sweep, self.next_sweep)

    def push(self, entry: _Entry) -> None:
        self.next_sweep.add(entry)
        self._count(entry, 1)

    def give_back(self, entry: _Entry) -> None:
        insort(self.gave_way, entry, key=_turn)
        self.gave_way_tokens += entry.item.tokens
        self._count(entry, 1)

    def pop(self) -> _Entry:
        if self.gave_way:
            entry = self.gave_way.pop(0)
            self.gave_way_tokens -= entry.item.tokens
        else:
            if not self.sweep:
                self.sweep, self.next_sweep = self.next_sweep, _Sweep()
            entry = self.sweep.pop()
        self._count(entry, -1)
        return entry

    def remove(self, entry: _Entry) -> None:
        if not (self.next_sweep.discard(entry) or self.sweep.discard(entry)):
            self.gave_way.remove(entry)
            self.gave_way_tokens -= entry.item.tokens
        self._count(entry, -1)

    def _count(self, entry: _Entry, n: int) -> None:
        self.waiting += n
        self.waiting_tokens += n * entry.item.tokens


class _Order:
    """Lanes sorted by rank. A lane leaves before its rank changes and comes back after."""

    def __init__(self) -> None:
        self._ranked: list[tuple[tuple[float, int], _Lane]] = []

    def __bool__(self) -> bool:
        return bool(self._ranked)

    def __iter__(self) -> Iterator[_Lane]:
        return (lane for _, lane in self._ranked)

    @property
    def first(self) -> _Lane:
        return self._ranked[0][1]

    def add(self, lane: _Lane) -> None:
        insort(self._ranked, (lane.rank, lane))

    def discard(self, lane: _Lane) -> None:
        at = bisect_left(self._ranked, (lane.rank,))
        if at < len(self._ranked) and self._ranked[at][1] is lane:
            del self._ranked[at]


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
        self._share = no_deadline_share
        self._lanes: dict[tuple[str, float | None], _Lane] = {}
        self._dated = _Order()
        self._undated = _Order()
        self._owed_tokens = 0.0  # to lanes without a deadline
        self._taken: dict[int, _Entry[T]] = {}  # by id of the request
        self._rids: list[tuple[str, int, _Entry[T]]] = []  # of all that wait or are taken, sorted
        self._never_taken: dict[int, float] = {}  # arrival by order: the oldest is first
        self._waiting = 0
        self._pushed = 0
        self._turns = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[T]:
        """What waits, job by job."""
        return (entry.of for lane in self._lanes.values() for entry in lane)

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
        item = _bounded(item)
        lane = self._lane_of(item)
        entry = _Entry(request, item, self._pushed, lane)
        insort(self._rids, (item.rid, entry.order, entry))
        self._never_taken[entry.order] = item.arrived_s
        if not lane.holds_new:
            self._level(lane)
        lane.push(entry)
        self._entered(lane)
        return True

    def next_that_gave_way(self) -> T | None:
        """What `take` would return first, if it was taken before and given back; else None."""
        if not self._waiting:
            return None
        gave_way = self._next_order().first.gave_way
        return gave_way[0].of if gave_way else None

    def take(self, n: int) -> list[T]:
        """Remove and return up to `n` requests, in the order in which they should run."""
        requests = []
        for _ in range(min(n, self._waiting)):
            entry = self._take_one()
            self._taken[id(entry.of)] = entry
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
            self._charge(entry, -entry.item.tokens)
            entry.lane.out -= 1
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
        self._charge(entry, _within(tokens, _MOST_TOKENS) - entry.item.tokens)
        entry.lane.out -= 1
        self._forget(entry)
        self._forget_if_idle(entry.lane)
        return entry.item

    def remove(self, matches: Callable[[T], bool]) -> list[T]:
        """Remove and return, in order of arrival, every waiting request that `matches`."""
        entries = [entry for lane in self._lanes.values() for entry in lane if matches(entry.of)]
        return self._remove(entries)

    def remove_rid(self, rid: str) -> list[T]:
        """The same for the requests of that id, without looking at every request."""
        at = bisect_left(self._rids, (rid,))
        named = []
        while at < len(self._rids) and self._rids[at][0] == rid:
            named.append(self._rids[at][2])
            at += 1
        return self._remove([entry for entry in named if id(entry.of) not in self._taken])

    def _remove(self, entries: list[_Entry[T]]) -> list[T]:
        for entry in entries:
            lane = entry.lane
            lane.remove(entry)
            self._waiting -= 1
            self._forget(entry)
            if not lane.waiting:
                self._order_of(lane).discard(lane)
                self._forget_if_idle(lane)
        return [entry.of for entry in sorted(entries, key=lambda entry: entry.order)]

    def backlog(self, now_s: float, tokens_per_s: float | None) -> Backlog:
        """The queue as it is.

        Args:
            now_s: on the clock of the items.
            tokens_per_s: how fast tokens, as items expect them, are being served; None when
                nobody knows, and then only what is late already is at risk. At least 0.
        """
        waiting = [lane for lane in self._lanes.values() if lane.waiting]
        return Backlog(
            requests=self._waiting,
            tokens=sum(lane.waiting_tokens for lane in waiting),
            jobs=len({lane.key[0] for lane in waiting}),
            oldest_wait_s=self._oldest_wait_s(now_s),
            at_risk=self._at_risk(now_s, tokens_per_s),
        )

    # ------------------------------------------------------------------ choosing

    @property
    def _contended(self) -> bool:
        """Whether lanes of both kinds wait."""
        return bool(self._dated) and bool(self._undated)

    def _next_order(self) -> _Order:
        undated = self._owed_tokens > 0 if self._contended else bool(self._undated)
        return self._undated if undated else self._dated

    def _take_one(self) -> _Entry[T]:
        contended, order = self._contended, self._next_order()
        lane = order.first
        entry = lane.pop()
        if not lane.waiting:
            order.discard(lane)
        if not entry.turn:
            self._turns += 1
            entry.turn = self._turns
        lane.out += 1
        entry.contended = contended
        self._never_taken.pop(entry.order, None)
        self._waiting -= 1
        self._charge(entry, entry.item.tokens)
        return entry

    def _charge(self, entry: _Entry[T], tokens: int) -> None:
        """Count `tokens`, which may be negative, as served to the request's lane."""
        undated = entry.lane.deadline_s is None
        if entry.contended:
            self._owed_tokens += tokens * (self._share - undated)
        if undated:
            self._serve(entry.lane, tokens)

    # --------------------------------------------------------------------- lanes

    def _order_of(self, lane: _Lane) -> _Order:
        return self._undated if lane.deadline_s is None else self._dated

    def _lane_of(self, item: OfflineItem) -> _Lane:
        key = (item.job, _coarse(item))
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key, self._pushed)
        return lane

    def _entered(self, lane: _Lane) -> None:
        self._waiting += 1
        if lane.waiting == 1:
            self._order_of(lane).add(lane)

    def _level(self, lane: _Lane) -> None:
        """A lane that had nothing new waiting starts level with those that had.

        What gave way was charged before and given back since; that much it may stay behind.
        """
        if lane.deadline_s is not None:
            return
        others = (other for other in self._undated if other is not lane)
        level = next(others, None) or max(self._lanes.values(), key=lambda one: one.served_tokens)
        behind_tokens = level.served_tokens - lane.gave_way_tokens - lane.served_tokens
        self._serve(lane, max(behind_tokens, 0))

    def _serve(self, lane: _Lane, tokens: int) -> None:
        if lane.waiting:
            self._undated.discard(lane)
        lane.served_tokens += tokens
        if lane.waiting:
            self._undated.add(lane)

    def _forget(self, entry: _Entry[T]) -> None:
        del self._rids[bisect_left(self._rids, (entry.item.rid, entry.order))]
        self._never_taken.pop(entry.order, None)

    def _forget_if_idle(self, lane: _Lane) -> None:
        if not lane.waiting and not lane.out:
            del self._lanes[lane.key]

    # ------------------------------------------------------------------- metrics

    def _oldest_wait_s(self, now_s: float) -> float:
        arrivals = [e.item.arrived_s for lane in self._lanes.values() for e in lane.gave_way]
        arrivals.append(next(iter(self._never_taken.values()), now_s))
        return max(0.0, now_s - min(arrivals))

    def _at_risk(self, now_s: float, tokens_per_s: float | None) -> int:
        tokens_per_s = inf if tokens_per_s is None else tokens_per_s
        at_risk, ahead_tokens = 0, 0
        for lane in self._dated:
            ahead_tokens += lane.waiting_tokens
            left_s = max(0.0, lane.deadline_s - now_s)  # in this order 0.0 where now_s is none
            in_time_tokens = left_s and left_s * tokens_per_s
            late_tokens = min(max(ahead_tokens - in_time_tokens, 0.0), lane.waiting_tokens)
            at_risk += ceil(late_tokens * lane.waiting / lane.waiting_tokens)
        return at_risk
