"""Which batch sends the next request. Pure.

A batch that would miss its deadline at the rate it can expect goes first, the earliest deadline
before the others. Otherwise the requests in flight are shared out evenly, so that a small batch is
done soon even when a large one was there before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

__all__ = ["Claim", "next_batch"]

T = TypeVar("T")

URGENT_SHARE = 0.8
"""A batch is urgent when it needs more than this share of the time it has left."""


class Claim(msgspec.Struct, frozen=True):
    """What one batch with something to send asks for.

    Args:
        deadline_s: when its completion window ends.
        in_flight: its requests under way.
        left: its requests that are not finished, those under way included.
    """

    deadline_s: float
    in_flight: int
    left: int


def next_batch(claims: Sequence[Claim], rate: float, now_s: float) -> int:
    """The index of the batch to send from.

    Args:
        claims: at least one.
        rate: requests that all batches together finished a second, of late; 0 when unknown.
        now_s: on the clock of the deadlines.
    """
    each = rate / len(claims)

    def is_urgent(claim: Claim) -> bool:
        return each > 0 and claim.left / each > URGENT_SHARE * (claim.deadline_s - now_s)

    urgent = [i for i, claim in enumerate(claims) if is_urgent(claim)]
    if urgent:
        return min(urgent, key=lambda i: claims[i].deadline_s)
    return min(range(len(claims)), key=lambda i: (claims[i].in_flight, claims[i].deadline_s))
