"""The order of SGLang's waiting queue, with online requests before offline ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conserve_sgl.engine.host import Req, SchedulePolicy

__all__ = ["OnlineFirst"]


class OnlineFirst(SchedulePolicy):
    """SGLang's order, then online before offline; the order is stable.

    Args:
        is_offline: tells an offline request.
        args: those that SGLang constructs its own policy with.
    """

    def __init__(self, is_offline: Callable[[Req], bool], *args: Any) -> None:
        super().__init__(*args)
        self._is_offline = is_offline

    def calc_priority(self, waiting_queue: list[Req], *args: Any, **kwargs: Any) -> bool:
        matched = super().calc_priority(waiting_queue, *args, **kwargs)
        waiting_queue.sort(key=self._is_offline)
        return matched
