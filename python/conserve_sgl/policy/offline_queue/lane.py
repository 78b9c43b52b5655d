"""The requests of one job that have one deadline, and which of them runs next.

What gave way runs first, in the order of first turns, so that none waits for others that began
later; then sweep by sweep in the order of adapters, of which a batch can hold a few only, and of
the prompts' first tokens, so that prompts with a common prefix follow each other and find it in the
radix tree. A request that comes during a sweep waits for the next one, so none is overtaken for
ever; but those whose adapter may not run now are passed over.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Generic, TypeVar

from conserve_sgl.policy.offline_queue.item import OfflineItem

__all__ = ["Entry", "Lane", "MayRun"]

T = TypeVar("T")

MayRun = Callable[[str], bool]
"""Whether a request with this adapter may run; if so it is taken before the next is asked for."""

_SERVED_KEPT = 256


class Entry(Generic[T]):
    """A request of the queue, waiting or taken."""

    __slots__ = ("contended", "item", "lane", "of", "order", "turn")

    def __init__(self, of: T, item: OfflineItem, order: int, lane: Lane) -> None:
        self.of = of
        self.item = item
        self.order = order
        self.lane = lane
        self.contended = False  # whether lanes of both kinds waited when it was taken
        self.turn = 0  # when it was taken first, counted in requests; 0 before

    def __lt__(self, other: Entry) -> bool:
        mine, others = self.item, other.item
        return (mine.adapter, mine.prefix, self.order) < (
            others.adapter,
            others.prefix,
            other.order,
        )


def _turn(entry: Entry) -> int:
    return entry.turn


def _adapter(entry: Entry) -> str:
    return entry.item.adapter


class _Sweep:
    """Requests sorted by adapter, prefix and arrival, and how far it has been served."""

    __slots__ = ("_entries", "_served")

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._served = 0

    def __len__(self) -> int:
        return len(self._entries) - self._served

    def __iter__(self) -> Iterator[Entry]:
        return islice(self._entries, self._served, None)

    def add(self, entry: Entry) -> None:
        insort(self._entries, entry, lo=self._served)

    def first(self, may_run: MayRun) -> Entry | None:
        """The first whose adapter may run: each adapter is asked for once."""
        at = self._served
        while at < len(self._entries):
            entry = self._entries[at]
            if may_run(entry.item.adapter):
                return entry
            at = bisect_right(self._entries, entry.item.adapter, lo=at, key=_adapter)
        return None

    def discard(self, entry: Entry) -> bool:
        """Whether it was there."""
        at = bisect_left(self._entries, entry, lo=self._served)
        if at == len(self._entries) or self._entries[at] is not entry:
            return False
        if at > self._served:
            del self._entries[at]
            return True
        self._served += 1
        if self._served == _SERVED_KEPT:  # moving all the others up for each would cost more
            del self._entries[:_SERVED_KEPT]
            self._served = 0
        return True


class Lane:
    """The requests of one job that have one deadline, or none.

    Attributes:
        key: job and deadline.
        deadline_s: of its requests, or None.
        tie: ranks it among its equals; the lower is served first.
        served_tokens: that its requests took, or are expected to take while they are out.
        out, out_tokens: requests that were taken and neither given back nor settled, and the tokens
            that they are expected to take.
        finished: requests that were settled.
        waiting, waiting_tokens: requests that wait, and the tokens that they are expected to take.
        gave_way, gave_way_tokens: of those, the ones that were taken before.
    """

    __slots__ = (
        "_next_sweep",
        "_sweep",
        "deadline_s",
        "finished",
        "gave_way",
        "gave_way_tokens",
        "key",
        "out",
        "out_tokens",
        "served_tokens",
        "tie",
        "waiting",
        "waiting_tokens",
    )

    def __init__(self, key: tuple[str, float | None], tie: int) -> None:
        self.key = key
        self.deadline_s = key[1]
        self.tie = tie
        self.served_tokens = 0
        self.out = self.out_tokens = 0
        self.finished = 0
        self.waiting = 0
        self.waiting_tokens = 0
        self.gave_way_tokens = 0
        self.gave_way: list[Entry] = []  # by turn
        self._sweep = _Sweep()
        self._next_sweep = _Sweep()

    @property
    def holds_new(self) -> bool:
        """Whether a request waits that was never taken."""
        return bool(self._sweep or self._next_sweep)

    @property
    def rank(self) -> tuple[float, int]:
        """Lanes of one kind are served in this order."""
        return (self.served_tokens if self.deadline_s is None else self.deadline_s, self.tie)

    def __iter__(self) -> Iterator[Entry]:
        return chain(self.gave_way, self._sweep, self._next_sweep)

    def push(self, entry: Entry) -> None:
        """Add a new request."""
        self._next_sweep.add(entry)
        self._count(entry, 1)

    def give_back(self, entry: Entry) -> None:
        """Add a request that was taken from here, and gave way."""
        insort(self.gave_way, entry, key=_turn)
        self.gave_way_tokens += entry.item.tokens
        self._count(entry, 1)

    def first(self, may_run: MayRun) -> Entry | None:
        """The request that runs next; None where none of them may."""
        back = (entry for entry in self.gave_way if may_run(entry.item.adapter))
        return next(back, None) or self._sweep.first(may_run) or self._next_sweep.first(may_run)

    def take(self, entry: Entry) -> None:
        """Take what is `first`."""
        if not self._sweep and not entry.turn:
            self._sweep, self._next_sweep = self._next_sweep, _Sweep()
        self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Take one that waits here, in its turn or not."""
        if not (self._next_sweep.discard(entry) or self._sweep.discard(entry)):
            self.gave_way.remove(entry)
            self.gave_way_tokens -= entry.item.tokens
        self._count(entry, -1)

    def went_out(self, entry: Entry, n: int) -> None:
        """A request was taken (1), or is out no longer (-1)."""
        self.out += n
        self.out_tokens += n * entry.item.tokens

    def _count(self, entry: Entry, n: int) -> None:
        self.waiting += n
        self.waiting_tokens += n * entry.item.tokens
