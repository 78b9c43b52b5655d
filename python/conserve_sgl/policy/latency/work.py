"""What a step computes."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import msgspec

__all__ = ["StepKind", "StepSample", "StepWork"]


class StepKind(IntEnum):
    """What a step holds; errors and forgetting are kept apart by it."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2


class StepWork(msgspec.Struct, frozen=True):
    """What one step computes.

    Args:
        prefill_tokens: new prompt tokens.
        prefill_attention: sum over prompts of P * (C + P / 2), for P new tokens over C resident
            ones (cached, or of earlier chunks); the query-key pairs that attention sees.
        decode_rows: requests that get one token each.
        decode_context: their tokens in KV, summed.
        prompts: requests that `prefill_tokens` belong to.
    """

    prefill_tokens: int = 0
    prefill_attention: float = 0.0
    decode_rows: int = 0
    decode_context: int = 0
    prompts: int = 0

    @classmethod
    def of(
        cls, prompts: Iterable[tuple[int, int]] = (), decode_contexts: Iterable[int] = ()
    ) -> StepWork:
        """The work of `prompts`, each (new tokens, resident tokens), and of decode rows."""
        tokens, attention, count = 0, 0.0, 0
        for new, resident in prompts:
            tokens += new
            attention += new * (resident + new / 2)
            count += 1
        rows = context = 0
        for length in decode_contexts:
            rows += 1
            context += length
        return cls(tokens, attention, rows, context, count)

    def plus(self, other: StepWork) -> StepWork:
        """Both in one step."""
        return StepWork(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_attention + other.prefill_attention,
            self.decode_rows + other.decode_rows,
            self.decode_context + other.decode_context,
            self.prompts + other.prompts,
        )

    def plus_prompt(self, new: int, resident: int) -> StepWork:
        """With one more prompt (or chunk) of `new` tokens over `resident` ones; 0 adds nothing."""
        if new <= 0:
            return self
        return StepWork(
            self.prefill_tokens + new,
            self.prefill_attention + new * (resident + new / 2),
            self.decode_rows,
            self.decode_context,
            self.prompts + 1,
        )

    @property
    def kind(self) -> StepKind:
        """Which errors apply; a step of nothing counts as decode."""
        if not self.prefill_tokens:
            return StepKind.DECODE
        return StepKind.MIXED if self.decode_rows else StepKind.PREFILL


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """A step that was measured."""

    work: StepWork
    seconds: float
