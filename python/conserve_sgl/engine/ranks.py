"""One value for every rank of a tensor-parallel group: rank 0's.

Rank 0 alone hears of arrivals, and no two ranks have the same clock; what they do has to be the
same all the same. With one rank nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from conserve_sgl.engine.host import broadcast_pyobj

__all__ = ["from_rank_zero", "int_of_rank_zero"]

T = TypeVar("T")


def from_rank_zero(group: Any, make: Callable[[], T]) -> T:
    """What `make()` gives on rank 0 of SGLang's GroupCoordinator `group`; only rank 0 calls it.

    The value is pickled: for what is not done at every layer.
    """
    if group.world_size == 1:
        return make()
    value = [make()] if group.is_first_rank else [None]
    return broadcast_pyobj(value, group.rank, group.cpu_group, src=group.first_rank)[0]


def int_of_rank_zero(group: Any, value: int) -> int:
    """Rank 0's `value`: one small message, for every layer boundary."""
    if group.world_size == 1:
        return value
    box = torch.tensor([value])
    torch.distributed.broadcast(box, group.first_rank, group=group.cpu_group)
    return int(box)
