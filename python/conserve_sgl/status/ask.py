"""What of the steps is asked for, and how it travels to the scheduler: as the id of SGLang's own
request for its internal state, which has no other field."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["Ask"]

_PREFIX = "conserve-status:"
_MOST = 2**53

Natural = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]


class Ask(msgspec.Struct, frozen=True):
    """The status, and of the steps those from `since` on, at most the `most` latest; None is all
    that are kept."""

    since: Natural | None = None
    most: Natural | None = 0

    def to_rid(self) -> str:
        """As an id."""
        return _PREFIX + msgspec.json.encode(self).decode()

    @classmethod
    def of_rid(cls, rid: str | None) -> Ask | None:
        """What an id asks for; None where it is no such id."""
        if rid is None or not rid.startswith(_PREFIX):
            return None
        try:
            return msgspec.json.decode(rid.removeprefix(_PREFIX), type=cls)
        except ValueError:
            return None


class Answer(msgspec.Struct, frozen=True):
    """What the scheduler answers: the reader has more time than the scheduler to unpack it.

    Args:
        snapshot: a `Snapshot` without steps, JSON.
        first: `seq` of the first step.
        steps: as `StepRing.read` gives them.
        epoch_s: the time of day at which the scheduler's monotonic clock was 0.
    """

    snapshot: bytes
    first: int = 0
    steps: bytes = b""
    epoch_s: float = 0.0
