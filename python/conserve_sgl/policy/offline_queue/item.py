"""What the queue knows of a request, in numbers that can be reckoned with.

No number that a request carries can raise here: this runs in the scheduler, and what raises there
ends the server. Times and tokens beyond what anybody means are brought within bounds.

A deadline is read to within a sixteenth of the time that it left on arrival, never later: clients
give the time that is left, request by request, and a job must not fall apart into as many lanes.
"""

from __future__ import annotations

from math import floor, frexp, isnan, ldexp

import msgspec

__all__ = ["OfflineItem", "bounded", "bounded_tokens", "coarse_deadline_s"]

_MOST_S = 1e12
_MOST_TOKENS = 10**12


class OfflineItem(msgspec.Struct, frozen=True, kw_only=True):
    """What the queue knows of a request.

    Args:
        rid: its id, by which it may be removed.
        tokens: prompt and output tokens that it is expected to take, at least 1.
        arrived_s: when the server received it, on the clock of `deadline_s`.
        job: the job it belongs to; requests without a name are one job, "".
        deadline_s: when it should be done, or None.
        prefix: `prefix_key` of its prompt.
        adapter: the adapter (LoRA) that it runs with, "" for none.
    """

    rid: str
    tokens: int
    arrived_s: float = 0.0
    job: str = ""
    deadline_s: float | None = None
    prefix: bytes = b""
    adapter: str = ""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a request takes at least one token: {self}")


def bounded(item: OfflineItem) -> OfflineItem:
    """The item with numbers that can be reckoned with, nearly always itself.

    A time that is no number is that of an item which says nothing: arrived at 0, no deadline.
    """
    tokens, arrived_s = min(item.tokens, _MOST_TOKENS), _time(item.arrived_s) or 0.0
    deadline_s = None if item.deadline_s is None else _time(item.deadline_s)
    if (tokens, arrived_s, deadline_s) == (item.tokens, item.arrived_s, item.deadline_s):
        return item
    return msgspec.structs.replace(item, tokens=tokens, arrived_s=arrived_s, deadline_s=deadline_s)


def bounded_tokens(tokens: int) -> int:
    """Tokens that a request took, to reckon with."""
    return _within(tokens, _MOST_TOKENS)


def _time(seconds: float) -> float | None:
    within_s = _within(seconds, _MOST_S)
    return None if isnan(within_s) else within_s


def _within(number: float, most: float) -> float:
    return min(max(number, -most), most)


def coarse_deadline_s(item: OfflineItem) -> float | None:
    """The deadline, brought forward by at most a sixteenth of the time left on arrival."""
    if item.deadline_s is None:
        return None
    left_s = max(item.deadline_s - item.arrived_s, 1.0)
    grain_s = ldexp(1.0, frexp(left_s)[1] - 5)  # a power of two, left_s / 32 < grain <= left_s / 16
    return floor(item.deadline_s / grain_s) * grain_s
