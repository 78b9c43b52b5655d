"""What a server takes, or a timer, or a tensor of 32 bits: beyond it every line would fail."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["MOST_INT32", "MOST_IN_FLIGHT", "MOST_S", "Count", "InFlight", "Priority", "Seconds"]

MOST_S = 10**9
MOST_INT32 = 2**31 - 1
MOST_IN_FLIGHT = 50_000
"""Each has a socket."""

Seconds = Annotated[float, msgspec.Meta(gt=0, le=MOST_S)]
Count = Annotated[int, msgspec.Meta(ge=1, le=MOST_INT32)]
InFlight = Annotated[int, msgspec.Meta(ge=1, le=MOST_IN_FLIGHT)]
Priority = Annotated[int, msgspec.Meta(ge=-MOST_INT32, le=MOST_INT32)]
