"""The offline backlog, beside SGLang's waiting queue and bounded.

First come, first served; a request that gave way (preempted, or refused by the KV pool) goes back
to the front, so that it is resumed before anything newer starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Generic, TypeVar

__all__ = ["OfflineQueue"]

T = TypeVar("T")


class OfflineQueue(Generic[T]):
    """A bounded queue of offline requests, opaque to it.

    Args:
        capacity: requests that may wait; those that were accepted before and come back count, but
            are never refused.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"an OfflineQueue holds at least one request, not {capacity}")
        self.capacity = capacity
        self._items: deque[T] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    @property
    def is_full(self) -> bool:
        """Whether the next `push` would be refused."""
        return len(self._items) >= self.capacity

    def push(self, item: T) -> bool:
        """Append a new request; False, and nothing changes, when the queue is full."""
        if self.is_full:
            return False
        self._items.append(item)
        return True

    def give_back(self, items: Iterable[T]) -> None:
        """Put requests that had left back in front, in their order. Never refuses."""
        self._items.extendleft(reversed(list(items)))

    def take(self, n: int) -> list[T]:
        """Remove and return up to `n` requests, in the order in which they should run."""
        taken = list(islice(self._items, n))
        for _ in taken:
            self._items.popleft()
        return taken

    def remove(self, matches: Callable[[T], bool]) -> list[T]:
        """Remove and return, in order, every request that `matches`."""
        removed = [item for item in self._items if matches(item)]
        if removed:
            self._items = deque(item for item in self._items if not matches(item))
        return removed
