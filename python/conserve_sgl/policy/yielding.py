"""How many layers of an offline prefill run before the engine looks up, and when it makes way.

An offline prefill runs in slices of whole layers. Before each slice the engine asks `next_layers`;
zero means that the batch is suspended here and goes on at this layer later. A slice takes at most
about `yield_s`, so that is what an online request waits for offline work.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Protocol

import msgspec

from conserve_sgl.policy.slo import Slo

__all__ = ["SliceDecision", "SliceView", "Slicing", "YieldMode"]


class YieldMode(StrEnum):
    """When a sliced prefill makes way for an online arrival."""

    EAGER = "eager"
    """At the next layer boundary."""

    SLACK = "slack"
    """At the last layer boundary at which the arrival's first token is still in time."""


class SliceView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known at a layer boundary. Times are seconds on one monotonic clock.

    Args:
        now_s: the time.
        layers_left: layers that the batch has still to compute, at least 1.
        layer_s: predicted time of one layer of this batch, above 0.
        arrival_s: when the oldest online request that is not in the scheduler yet was announced.
        online_s: predicted time of that request's prefill; 0 while none was seen.
        until_s: when the slack of the step ends, and online work that is already here goes on.
    """

    now_s: float
    layers_left: int
    layer_s: float
    arrival_s: float | None = None
    online_s: float = 0.0
    until_s: float = math.inf


class SliceDecision(Protocol):
    """Decides at layer boundaries; see `Slicing`."""

    def worth_slicing(self, layers: int, layer_s: float) -> bool:
        """Whether a prefill of `layers` layers is to be sliced at all."""
        ...

    def next_layers(self, view: SliceView) -> int:
        """Layers to run now, at most `view.layers_left`; 0 suspends the batch."""
        ...


class Slicing:
    """Slices of at most `yield_s`, and a yield to arrivals.

    Args:
        yield_s: the longest that a slice should take.
        mode: when an arrival is yielded to.
        slo: whose time to first token `YieldMode.SLACK` keeps.
    """

    def __init__(self, *, yield_s: float, mode: YieldMode, slo: Slo) -> None:
        self._yield_s = yield_s
        self._mode = mode
        self._slo = slo

    def worth_slicing(self, layers: int, layer_s: float) -> bool:
        """See `SliceDecision`: not when the whole prefill takes no longer than one slice may."""
        return layers * layer_s > self._yield_s

    def next_layers(self, view: SliceView) -> int:
        """See `SliceDecision`: a slice takes at most `yield_s` unless a single layer takes more."""
        if view.arrival_s is not None and self._mode is YieldMode.EAGER:
            return 0
        fit = (self._end_s(view) - view.now_s) / view.layer_s
        if fit < 1.0:
            return 0
        return max(int(min(view.layers_left, self._yield_s / view.layer_s, fit)), 1)

    def _end_s(self, view: SliceView) -> float:
        if view.arrival_s is None:
            return view.until_s
        wait_s = self._slo.ttft_allowance_s(view.online_s)
        return min(view.until_s, view.arrival_s + wait_s)
