"""Between the lanes of a queue: whose turn it is.

1. Between lanes with a deadline: the earliest one first, a request that has missed its own
   included. Of what both kinds are served while both wait, lanes without a deadline get
   `no_deadline_share`.
2. Between lanes without a deadline: the one that was served the fewest tokens, so that jobs get
   equal shares of the engine whatever the length of their prompts (start-time fair queueing; a
   job that had nothing waiting starts level with the others, with neither credit nor debt).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain

from conserve_sgl.policy.offline_queue.item import OfflineItem, coarse_deadline_s
from conserve_sgl.policy.offline_queue.lane import Entry, Lane

__all__ = ["Lanes"]


class _Order:
    """Lanes sorted by rank. A lane leaves before its rank changes and comes back after."""

    def __init__(self) -> None:
        self._ranked: list[tuple[tuple[float, int], Lane]] = []

    def __bool__(self) -> bool:
        return bool(self._ranked)

    def __iter__(self) -> Iterator[Lane]:
        return (lane for _, lane in self._ranked)

    @property
    def first(self) -> Lane:
        return self._ranked[0][1]

    def add(self, lane: Lane) -> None:
        insort(self._ranked, (lane.rank, lane))

    def discard(self, lane: Lane) -> None:
        at = bisect_left(self._ranked, (lane.rank,))
        if at < len(self._ranked) and self._ranked[at][1] is lane:
            del self._ranked[at]


class Lanes:
    """The lanes of a queue; those in which something waits are in order.

    Args:
        no_deadline_share: of the tokens served while requests with and without a deadline wait,
            the share of the latter, 0 to 1; short of it by at most one request.

    Attributes:
        share: that.
    """

    def __init__(self, no_deadline_share: float) -> None:
        self.share = no_deadline_share
        self._lanes: dict[tuple[str, float | None], Lane] = {}
        self._dated = _Order()
        self._undated = _Order()
        self._owed_tokens = 0.0  # to lanes without a deadline

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        """All, those in which nothing waits included."""
        return iter(self._lanes.values())

    @property
    def dated(self) -> Iterator[Lane]:
        """Those with a deadline in which something waits, the earliest first."""
        return iter(self._dated)

    def lane_of(self, item: OfflineItem, tie: int) -> Lane:
        """The lane of an item; a new one ranks by `tie` among its equals."""
        key = (item.job, coarse_deadline_s(item))
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key, tie)
        return lane

    # -------------------------------------------------------------------- whose turn

    @property
    def contended(self) -> bool:
        """Whether lanes of both kinds wait."""
        return bool(self._dated) and bool(self._undated)

    @property
    def in_turn(self) -> Iterator[Lane]:
        """Those in which something waits, the one whose turn it is first."""
        undated = self._owed_tokens > 0 if self.contended else bool(self._undated)
        kinds = (self._undated, self._dated) if undated else (self._dated, self._undated)
        return chain(*kinds)

    def entered(self, lane: Lane) -> None:
        """A request was added to `lane`."""
        if lane.waiting == 1:
            self._order_of(lane).add(lane)

    def left(self, lane: Lane) -> None:
        """A request was taken from `lane`."""
        if not lane.waiting:
            self._order_of(lane).discard(lane)

    def forget_if_idle(self, lane: Lane) -> None:
        """Drop a lane of which nothing waits and nothing is out."""
        if not lane.waiting and not lane.out:
            del self._lanes[lane.key]

    def _order_of(self, lane: Lane) -> _Order:
        return self._undated if lane.deadline_s is None else self._dated

    # ---------------------------------------------------------------------- fairness

    def charge(self, entry: Entry, tokens: int) -> None:
        """Count `tokens`, which may be negative, as served to the request's lane."""
        undated = entry.lane.deadline_s is None
        if entry.contended:
            self._owed_tokens += tokens * (self.share - undated)
        if undated:
            self._serve(entry.lane, tokens)

    def level(self, lane: Lane) -> None:
        """A lane that had nothing new waiting starts level with those that had.

        What gave way was charged before and given back since; that much it may stay behind.
        """
        if lane.deadline_s is not None:
            return
        others = (other for other in self._undated if other is not lane)
        level = next(others, None) or max(self._lanes.values(), key=lambda one: one.served_tokens)
        behind_tokens = level.served_tokens - lane.gave_way_tokens - lane.served_tokens
        self._serve(lane, max(behind_tokens, 0))

    def _serve(self, lane: Lane, tokens: int) -> None:
        if lane.waiting:
            self._undated.discard(lane)
        lane.served_tokens += tokens
        if lane.waiting:
            self._undated.add(lane)
