"""The latest steps of an engine, in a ring of fixed size.

A step is written twice: when it is formed, and when its time is known. What is read leaves as the
bytes that it was written as, since the reader has more time than the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan
from struct import Struct

from conserve_sgl.policy.bound import Bound
from conserve_sgl.status.record import Step

__all__ = ["KEPT_STEPS", "StepRing", "steps_of"]

KEPT_STEPS = 4096
"""A minute of an engine that takes 15 ms for a step, in 240 KiB."""

# Start (monotonic), seconds, idle; prompt tokens and rows, online and offline; parked; arrivals,
# preemptions, yields; bound, sliced, follows another.
_STEP = Struct("<ddd5I3IB??x")
_TIMES = Struct("<ddd")
_SLICED_AT, _FOLLOWS_AT = _STEP.size - 3, _STEP.size - 2
_BOUNDS = tuple(Bound)
_INDEX = {bound: index for index, bound in enumerate(_BOUNDS)}


class StepRing:
    """Keeps the latest steps. Allocates nothing after it is made.

    `formed` belongs where a step is formed, `ended` where its time is known; they follow each other
    in the same order, at most a few steps apart.

    Args:
        kept: steps.

    Attributes:
        ended_steps: `seq` of the first step that has not ended.
    """

    def __init__(self, kept: int = KEPT_STEPS) -> None:
        self._kept = kept
        self._buffer = bytearray(kept * _STEP.size)
        self._formed = 0
        self.ended_steps = 0
        self._end_s = 0.0
        self._arrivals = self._preemptions = self._yields = 0

    def formed(
        self,
        now_s: float,
        *,
        online_prompt_tokens: int,
        online_rows: int,
        offline_prompt_tokens: int,
        offline_rows: int,
        offline_parked: int,
        bound: Bound,
        arrivals: int,
        preemptions: int,
        yields: int,
    ) -> None:
        """A step was formed. Arguments as for `Step`, but the last three count from the start of
        the server."""
        _STEP.pack_into(
            self._buffer,
            self._formed % self._kept * _STEP.size,
            now_s,
            nan,
            0.0,
            online_prompt_tokens,
            online_rows,
            offline_prompt_tokens,
            offline_rows,
            offline_parked,
            arrivals - self._arrivals,
            preemptions - self._preemptions,
            yields - self._yields,
            _INDEX[bound],
            False,
            self._formed > self.ended_steps,
        )
        self._arrivals, self._preemptions, self._yields = arrivals, preemptions, yields
        self._formed += 1

    def ended(self, now_s: float, seconds: float, *, sliced: bool) -> None:
        """The oldest step that was formed and has not ended took so long until now; 0 where that
        was not measured, and then it is the time from its start, or the end of the one before.
        `sliced`: whether it ran in slices."""
        if self.ended_steps == self._formed:
            return
        offset = self.ended_steps % self._kept * _STEP.size
        if seconds <= 0:
            formed_s, _, _ = _TIMES.unpack_from(self._buffer, offset)
            seconds = now_s - max(formed_s, self._end_s)
        start_s, idle_s = now_s - seconds, 0.0
        if self._end_s and not self._buffer[offset + _FOLLOWS_AT]:
            idle_s = max(start_s - self._end_s, 0.0)
        _TIMES.pack_into(self._buffer, offset, start_s, seconds, idle_s)
        self._buffer[offset + _SLICED_AT] = sliced
        self._end_s = now_s
        self.ended_steps += 1

    def forget(self) -> None:
        """The steps in flight will not be timed."""
        self.ended_steps = self._formed

    def read(self, since: int | None, most: int | None) -> tuple[int, bytes]:
        """The steps that have ended, oldest first.

        Args:
            since: `seq` of the first; None is as far back as there are.
            most: this many, the latest.

        Returns:
            `seq` of the first, and the steps, for `steps_of`.
        """
        first = max(self.ended_steps - self._kept + self._in_flight, since or 0, 0)
        if most is not None:
            first = max(first, self.ended_steps - most)
        first = min(first, self.ended_steps)
        begin, end = first % self._kept * _STEP.size, self.ended_steps % self._kept * _STEP.size
        if first == self.ended_steps:
            return first, b""
        if begin < end:
            return first, bytes(self._buffer[begin:end])
        return first, bytes(self._buffer[begin:] + self._buffer[:end])

    @property
    def _in_flight(self) -> int:
        return self._formed - self.ended_steps


def steps_of(first: int, packed: bytes, *, epoch_s: float) -> Sequence[Step]:
    """What `StepRing.read` gave, as records.

    Args:
        first: `seq` of the first.
        packed: the steps.
        epoch_s: the time of day at which the monotonic clock of the ring was 0.
    """
    return [
        Step(
            seq=seq,
            start_s=row[0] + epoch_s,
            seconds=None if isnan(row[1]) else row[1],
            idle_s=row[2],
            online_prompt_tokens=row[3],
            online_rows=row[4],
            offline_prompt_tokens=row[5],
            offline_rows=row[6],
            offline_parked=row[7],
            sliced=row[12],
            bound=_BOUNDS[row[11]].value,
            arrivals=row[8],
            preemptions=row[9],
            yields=row[10],
        )
        for seq, row in enumerate(_STEP.iter_unpack(packed), first)
    ]
