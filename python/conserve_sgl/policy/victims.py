"""Which offline requests give way when online requests need their KV."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

__all__ = ["Candidate", "choose_victims"]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An offline request that holds KV.

    Args:
        index: names the request to the caller.
        total_tokens: KV that it holds.
        checkpointed_tokens: of these, what survives the release.
        is_running: it decodes, rather than sits out.
    """

    index: int
    total_tokens: int
    checkpointed_tokens: int
    is_running: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.checkpointed_tokens <= self.total_tokens:
            raise ValueError(f"a checkpoint is part of what is held: {self}")

    @property
    def lost_tokens(self) -> int:
        """What would have to be computed again."""
        return self.total_tokens - self.checkpointed_tokens


def choose_victims(candidates: Sequence[Candidate], needed_tokens: int) -> list[Candidate]:
    """The requests to release, in order, until `needed_tokens` are free; all if they do not do.

    Least to compute again first. Between equals, one that sits out before one that decodes, then
    the one that frees most, so that fewer give way; then the newest, for the oldest is nearest
    to its end.
    """
    order = sorted(
        candidates,
        key=lambda c: (c.lost_tokens, c.is_running, -c.total_tokens, -c.index),
    )
    victims: list[Candidate] = []
    freed = 0
    for candidate in order:
        if freed >= needed_tokens:
            break
        victims.append(candidate)
        freed += candidate.total_tokens
    return victims
