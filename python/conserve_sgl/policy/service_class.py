"""Which service class a priority value means, and which value each class carries.

SGLang carries one integer, `priority`, from every route to the scheduler. A request is offline
when its priority is less urgent than the server's default; the sign follows
`--schedule-low-priority-values-first`. One canonical value per class is stamped at the door, so
that metrics labelled by priority have two values and not as many as there are clients.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec

__all__ = ["PriorityRule", "ServiceClass"]


class ServiceClass(Enum):
    """Online requests have latency objectives; offline work takes what they leave."""

    ONLINE = "online"
    OFFLINE = "offline"


class PriorityRule(msgspec.Struct, frozen=True):
    """How this server reads `priority`.

    Args:
        default: the priority of a request that carries none.
        low_values_first: True when smaller values are more urgent.
    """

    default: int = 0
    low_values_first: bool = False

    @classmethod
    def of(cls, settings: Any) -> PriorityRule:
        """The rule of a server, from its `default_priority_value` and
        `schedule_low_priority_values_first`: SGLang's ServerArgs, or its schedule settings.

        Both processes read it here, since what one stamps the other must read the same way.
        """
        return cls(
            default=settings.default_priority_value or 0,
            low_values_first=settings.schedule_low_priority_values_first,
        )

    @property
    def offline_priority(self) -> int:
        """The value stamped on every offline request."""
        return self.default + 1 if self.low_values_first else self.default - 1

    def class_of(self, priority: int | None) -> ServiceClass:
        """The class that `priority` stands for; None is the default, hence online."""
        return ServiceClass.OFFLINE if self.is_offline(priority) else ServiceClass.ONLINE

    def is_offline(self, priority: int | None) -> bool:
        """Whether it stands for offline work: asked of every row several times a step."""
        if priority is None:
            return False
        return priority > self.default if self.low_values_first else priority < self.default

    def stamp(self, priority: int | None, service_class: ServiceClass) -> int:
        """The value that a request of `service_class` carries from the door on.

        An online request keeps its own urgency among online requests, unless its priority would
        read as offline.
        """
        if service_class is ServiceClass.OFFLINE:
            return self.offline_priority
        if priority is None or self.class_of(priority) is ServiceClass.OFFLINE:
            return self.default
        return priority
