"""Offline requests that hold rows and KV out of SGLang's sight, and come back to it as they are.

parked       rows that sit out: see `parking.py`
chunk        one prompt between two of its chunks. SGLang continues its one chunked request
             before anything else and assumes that there is no other
suspended    prompts whose prefill stopped between two layers: see `slices.py`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from conserve_sgl.engine.host import Req, ScheduleBatch
from conserve_sgl.engine.parking import ParkedRows
from conserve_sgl.engine.slices import LayerSlices

__all__ = ["Aside"]


class Aside:
    """What is put aside; the parts may be used directly.

    Args:
        slices: holds the prefill that is suspended.
        is_offline: tells an offline request; no other is put aside.
        counts: of events, to be added to.
    """

    def __init__(
        self, slices: LayerSlices, is_offline: Callable[[Req], bool], counts: Counter[str]
    ) -> None:
        self.parked = ParkedRows()
        self.chunk: Req | None = None
        self.slices = slices
        self._is_offline = is_offline
        self._counts = counts

    @property
    def whole(self) -> list[Req]:
        """All but the suspended: each of them can be taken by itself."""
        chunk = [] if self.chunk is None else [self.chunk]
        return [*self.parked.reqs, *chunk]

    @property
    def reqs(self) -> list[Req]:
        """All that hold rows and KV here."""
        return self.whole + self.slices.suspended_reqs

    def sit_out(self, batch: ScheduleBatch, rows: int) -> None:
        """Have the offline rows of `batch`, which changes in place, sit out beyond so many."""
        surplus = sum(map(self._is_offline, batch.reqs)) - rows
        moved = self.parked.sit_out(batch, surplus, self._is_offline)
        self._counts["offline_rows_parked"] += moved

    def put_chunk(self, req: Req) -> None:
        """Put a prompt aside between two of its chunks; only while there is none."""
        assert self.chunk is None  # the adder chunks one offline prompt at a time
        self.chunk = req
        self._counts["offline_chunks_parked"] += 1

    def take(self, matches: Callable[[Req], bool]) -> list[Req]:
        """Take those of `whole` that match; they still hold their rows and KV."""
        taken = self.parked.remove(matches)
        if self.chunk is not None and matches(self.chunk):
            taken.append(self.chunk)
            self.chunk = None
        return taken
