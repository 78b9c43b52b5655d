"""Offline tokens a second: what is served, and what the engine would do of it alone."""

from __future__ import annotations

from collections.abc import Callable

from conserve_sgl.policy.latency import StepWork
from conserve_sgl.policy.rate import Rate
from conserve_sgl.policy.step import StepView

__all__ = ["Throughput", "alone_tokens_per_s"]

_EVERY_S = 1.0
_LEAST_TOKENS = 1.0
"""Tokens a second below which nobody can tell prompts from answers."""


def alone_tokens_per_s(
    predict_s: Callable[[StepWork], float],
    *,
    prompt_share: float,
    rows: int,
    context_tokens: int,
    chunk_tokens: int,
) -> float | None:
    """Tokens a second, of prompts and of answers, of an engine that does nothing else.

    A prompt token takes its part of a whole chunk, an answer's token its part of a step of all
    rows; mixed as they are served, harmonically. None where the model says that it takes no time.

    Args:
        predict_s: mean seconds of a step, of the latency model.
        prompt_share: of the tokens, those of prompts.
        rows: that decode at a time.
        context_tokens: of a row.
        chunk_tokens: prompt tokens of a step.
    """
    prompt_s = predict_s(StepWork.of([(chunk_tokens, 0)])) / chunk_tokens
    decoding = StepWork(decode_rows=rows, decode_context=rows * context_tokens)
    output_s = predict_s(decoding) / rows
    token_s = prompt_share * prompt_s + (1 - prompt_share) * output_s
    return 1 / token_s if token_s > 0 else None


class Throughput:
    """Measures it, from one look a second.

    Attributes:
        tokens_per_s: prompt tokens computed and output tokens a second, in the last half minute or
            so; None before the second look.
    """

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self._seen_s: float | None = None
        self._computed = self._output = 0
        self._prompts, self._outputs = Rate(), Rate()
        self._prompt_share: float | None = None
        self._context_tokens = 0

    def look(self, now_s: float, view: StepView, *, computed: int, output: int) -> None:
        """Take in what was served since the last look, if that is a second ago.

        Args:
            now_s: a monotonic clock.
            view: of the step.
            computed: offline prompt tokens computed since the start.
            output: offline tokens answered since the start.
        """
        seconds = 0.0 if self._seen_s is None else now_s - self._seen_s
        if self._seen_s is not None and seconds < _EVERY_S:
            return
        if seconds > 0:
            self._prompts.follow((computed - self._computed) / seconds, seconds)
            self._outputs.follow((output - self._output) / seconds, seconds)
            self.tokens_per_s = self._prompts.value + self._outputs.value
            if self.tokens_per_s >= _LEAST_TOKENS:
                self._prompt_share = self._prompts.value / self.tokens_per_s
        self._seen_s, self._computed, self._output = now_s, computed, output
        if context_tokens := view.offline_decoding.mean_context_tokens:
            self._context_tokens = context_tokens

    def alone_tokens_per_s(
        self, predict_s: Callable[[StepWork], float], view: StepView
    ) -> float | None:
        """What the engine would serve with no online request there and enough such offline work;
        None before any was served.

        Args:
            predict_s: mean seconds of a step, of the latency model.
            view: what there is of rows and KV.
        """
        if self._prompt_share is None or view.chunk_tokens < 1:
            return None
        context_tokens = max(self._context_tokens, 1)
        rows = min(view.max_rows, view.total_kv_tokens // context_tokens)
        return alone_tokens_per_s(
            predict_s,
            prompt_share=self._prompt_share,
            rows=max(rows, 1),
            context_tokens=context_tokens,
            chunk_tokens=min(view.chunk_tokens, max(view.total_kv_tokens, 1)),
        )
