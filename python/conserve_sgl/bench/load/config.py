"""The YAML of a load: the online stream, and the backlog beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from conserve_sgl.bench.load.arrivals import Count, NotNegative, Positive, Source
from conserve_sgl.bench.load.backlog import Backlog
from conserve_sgl.bench.load.prompts import TokenIds
from conserve_sgl.errors import InputError

__all__ = ["OfflineLoad", "OnlineConfig"]

_ARRIVALS, _BACKLOG = "online.arrivals", "offline.backlog"


class OnlineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The online stream: the same arrivals and lengths in every run of it, other prompts in each.

    Requests unfinished `drain_s` seconds after the last arrival are given up and count as misses.
    """

    arrivals: Source
    duration_s: Positive
    drain_s: NotNegative = 30.0
    token_ids: TokenIds = TokenIds()

    def found_from(self, file: Path, trace: Path | None = None) -> OnlineConfig:
        """With the path of its trace, if it replays one, made ready to be opened.

        Args:
            file: that it stands in, as `online`; the path is relative to it, and may hold
                environment variables.
            trace: stands for that path.

        Raises:
            InputError: such a variable is not set, or `trace` is given and this replays none.
        """
        if trace is None:
            arrivals = _with_path(file, self.arrivals, _ARRIVALS)
        elif hasattr(self.arrivals, "path"):
            arrivals = msgspec.structs.replace(self.arrivals, path=str(trace))
        else:
            reason = "is not a trace, so --trace cannot stand for it"
            raise InputError(file, reason, key=_ARRIVALS)
        return msgspec.structs.replace(self, arrivals=arrivals)


class OfflineLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The backlog: `in_flight` requests at a time, from `lead_s` before the stream begins."""

    backlog: Backlog
    in_flight: Count
    lead_s: NotNegative = 8.0

    def found_from(self, file: Path) -> OfflineLoad:
        """With the path of its prompts, if they are read, made ready to be opened.

        Args:
            file: that it stands in, as `offline`; see `OnlineConfig.found_from`.

        Raises:
            InputError: an environment variable in the path is not set.
        """
        backlog = _with_path(file, self.backlog, _BACKLOG)
        return msgspec.structs.replace(self, backlog=backlog)


def _with_path(file: Path, source: Any, key: str) -> Any:
    if not hasattr(source, "path"):
        return source
    expanded = os.path.expandvars(source.path)
    if "$" in expanded:
        raise InputError(file, f"{source.path}: set that variable", key=f"{key}.path")
    return msgspec.structs.replace(source, path=str(file.parent / expanded))
