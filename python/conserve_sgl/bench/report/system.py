"""What a configuration says of one system that is measured, or simulated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec

from conserve_sgl.bench.load.arrivals import Positive
from conserve_sgl.bench.report.metrics import Slo

__all__ = ["SystemConfig", "check_names"]

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class SystemConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One server to measure.

    `load` says which of the two loads it gets. `online_body` and `offline_body` are request
    fields of its own; offline requests to a `conserve` system carry conserve's header, too.
    `conserve` is the content of the file that CONSERVE_CONFIG names. Systems that differ in the
    setting of one dial say it in `dial`, and are joined by a line in the plot of the trade-off.
    `slo` and `window_s` stand for the benchmark's objectives and duration: a system that is set to
    another objective is judged by that one, and one that is a point of a curve may be shorter.
    """

    name: Name
    kind: Literal["stock", "conserve"]
    load: Literal["both", "online", "offline"] = "both"
    flags: tuple[str, ...] = ()
    env: dict[str, str] = {}
    online_body: dict[str, Any] = {}
    offline_body: dict[str, Any] = {}
    conserve: dict[str, Any] | None = None
    dial: str | None = None
    slo: Slo | None = None
    window_s: Positive | None = None

    def __post_init__(self) -> None:
        if self.conserve is not None and self.kind != "conserve":
            raise ValueError("a stock system takes no conserve section")

    @property
    def is_online_baseline(self) -> bool:
        """Whether it measures stock SGLang without offline work."""
        return self.kind == "stock" and self.load == "online"

    @property
    def is_offline_ceiling(self) -> bool:
        """Whether it measures stock SGLang with offline work alone."""
        return self.kind == "stock" and self.load == "offline"


def check_names(systems: Iterable[SystemConfig]) -> None:
    """Raise ValueError when two of `systems` share a name, and so the place of their results."""
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two systems are named {name}")
