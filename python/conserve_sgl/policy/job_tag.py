"""What an offline request says of the job it belongs to, on its way to the scheduler.

It travels in SGLang's `sampling_params.custom_params`, a dictionary of plain values that every
route, session and parallel sample carries along and that sampling itself does not read. The
scheduler takes it out again, so a custom logit processor never sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["LONGEST_LEFT_S", "TAG_KEY", "JobTag"]

TAG_KEY = "conserve"
"""The key of the tag among the `custom_params`."""

LONGEST_LEFT_S = 10**10
"""Deadlines further off than this many seconds, or further past, are refused at the door. It is 317
years, more than any window of a batch (99999d)."""


class JobTag(msgspec.Struct, frozen=True, omit_defaults=True):
    """The job of an offline request.

    Args:
        received_s: CLOCK_MONOTONIC of the process that received it; one clock for a machine, and
            one value for all ranks.
        job: its name; requests without one are one job, "".
        deadline_s: when it should be done, on the same clock, or None.
    """

    received_s: float
    job: str = ""
    deadline_s: float | None = None

    def put_into(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """A copy of some `custom_params`, which may be None, with this tag among them."""
        return {**(params or {}), TAG_KEY: msgspec.to_builtins(self)}

    @classmethod
    def take_out(cls, params: Any) -> tuple[JobTag | None, dict[str, Any] | None]:
        """The tag among some `custom_params`, and a copy without it, None where nothing is left.

        Something else under the tag's key, which no door of ours put there, is taken out too and
        is no tag.
        """
        if not isinstance(params, dict) or TAG_KEY not in params:
            return None, params
        rest = {key: value for key, value in params.items() if key != TAG_KEY}
        try:
            tag = msgspec.convert(params[TAG_KEY], cls)
        except msgspec.ValidationError:
            tag = None
        return tag, rest or None
