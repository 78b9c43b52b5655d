"""A batch that is sent from: what is left of it, what is in flight, and its open files."""

from __future__ import annotations

import asyncio
from collections import deque
from enum import Enum

from conserve_sgl.batch.results import Results
from conserve_sgl.batch.server.share import Claim
from conserve_sgl.batch.validate import Plan
from conserve_sgl.client.http import Client

__all__ = ["Ending", "OpenBatch"]


class Ending(Enum):
    """Why a batch sends nothing more."""

    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    BROKEN = "broken"  # `OpenBatch.fault` says why
    LEFT = "left"  # the server stops, and the next one goes on


class OpenBatch:
    """An open batch: what is left of it, what is in flight, and its result files.

    Args:
        batch_id: sent along as the name of the job.
        deadline_s: when its window ends, Unix time.
        plan: the lines that are not done; those apart are sent alone.
        source: the input file's descriptor.

    `client` is there while the lines go out to several servers; `ended` is set once nothing more is
    sent, `abort` once what is in flight is given up, `settled` once nothing is.
    """

    def __init__(
        self, batch_id: str, deadline_s: float, plan: Plan, results: Results, source: int
    ) -> None:
        self.batch_id = batch_id
        self.deadline_s = deadline_s
        self.results = results
        self.source = source
        self.writing = asyncio.Lock()
        self.client: Client | None = None
        self.ended = asyncio.Event()
        self.abort = asyncio.Event()
        self.settled = asyncio.Event()
        self.ending: Ending | None = None
        self.fault: Exception | None = None
        self.in_flight = 0
        self._suspects = deque(plan.apart)
        self._unsent = len(plan) + len(plan.apart)
        self._lines = iter(plan)
        self._look()

    @property
    def can_send(self) -> bool:
        """Whether it has a use for a slot."""
        return self._unsent > 0 and self.ending is None

    @property
    def sends_alone(self) -> bool:
        """Whether the next line must be in flight alone."""
        return bool(self._suspects) and self.can_send

    def claim(self) -> Claim:
        """What it asks of `share.next_batch`."""
        return Claim(self.deadline_s, self.in_flight, self._unsent + self.in_flight)

    def take(self) -> tuple[int, int]:
        """Where the next line is in the input."""
        self._unsent -= 1
        self.in_flight += 1
        return self._suspects.popleft() if self._suspects else next(self._lines)

    def give_back(self) -> None:
        """A line that was taken is done, or will not be."""
        self.in_flight -= 1
        self._look()

    def end(self, ending: Ending) -> None:
        """Send nothing more. The first reason stands."""
        self.ending = self.ending or ending
        self.ended.set()
        self._look()

    def break_off(self, fault: Exception) -> None:
        """Send nothing more, because of `fault`."""
        if self.ending is None:
            self.fault = fault
        self.end(Ending.BROKEN)

    def _look(self) -> None:
        if self.in_flight == 0 and self._unsent == 0:
            self.ending = self.ending or Ending.COMPLETED
        if self.in_flight == 0 and self.ending is not None:
            self.settled.set()
