"""Offline requests that hold rows and KV out of SGLang's sight, and come back to it as they are.

parked       rows that sit out: see `parking.py`
chunk        one prompt between two of its chunks. SGLang continues its one chunked request
             before anything else and assumes that there is no other
suspended    prompts whose prefill stopped between two layers: see `slices.py`
"""

from __future__ import annotations

from collections.abc import Callable

from conserve_sgl.engine.host import Req
from conserve_sgl.engine.parking import ParkedRows
from conserve_sgl.engine.slices import LayerSlices

__all__ = ["Aside"]


class Aside:
    """What is put aside; `chunk` and the parts may be used directly.

    Args:
        slices: holds the prefill that is suspended.
    """

    def __init__(self, slices: LayerSlices) -> None:
        self.parked = ParkedRows()
        self.chunk: Req | None = None
        self.slices = slices

    @property
    def whole(self) -> list[Req]:
        """All but the suspended: each of them can be taken by itself."""
        chunk = [] if self.chunk is None else [self.chunk]
        return [*self.parked.reqs, *chunk]

    @property
    def reqs(self) -> list[Req]:
        """All that hold rows and KV here."""
        return self.whole + self.slices.suspended_reqs

    def take(self, matches: Callable[[Req], bool]) -> list[Req]:
        """Take those of `whole` that match; they still hold their rows and KV."""
        taken = self.parked.remove(matches)
        if self.chunk is not None and matches(self.chunk):
            taken.append(self.chunk)
            self.chunk = None
        return taken
