"""Which parts fit into the time that is left."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from conserve_sgl.bench.gpu.parts import Part

__all__ = ["END_S", "Planned", "plan"]

END_S = 15.0
"""Kept at the end, for the last archives and the summary."""


class Planned(msgspec.Struct, frozen=True):
    """A part with its time.

    Args:
        part: what to run.
        starts_s: seconds from now, if all before it takes what it wants.
        limit_s: when it is cut off, after its start.
    """

    part: Part
    starts_s: float
    limit_s: float


def plan(parts: Iterable[Part], left_s: float) -> list[Planned]:
    """The parts to run within `left_s`, in their order.

    Each takes what it wants, or what is left if that is at least what it needs. A part that does
    not fit gives its place to a later, smaller one.
    """
    planned, at_s = [], 0.0
    for part in parts:
        left = left_s - END_S - at_s
        if left < part.least_s:
            continue
        planned.append(Planned(part, at_s, min(part.limit_s, left)))
        at_s += min(part.wants_s, left)
    return planned
