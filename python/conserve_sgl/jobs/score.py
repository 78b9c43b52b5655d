"""Scores: exact match after a regex, and choice by loglikelihood. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec

from conserve_sgl.jobs.schema import ExactMatch, LoglikelihoodChoice

__all__ = [
    "ChoiceLogprob",
    "extract",
    "matches",
    "pick_choice",
    "shared_prefix_tokens",
    "standard_error",
]


class ChoiceLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One choice's log-probability given the context, over the `tokens` that were scored."""

    logprob: float | None  # None is minus infinity, as JSON has none
    tokens: int


def extract(score: ExactMatch, output: str) -> str | None:
    """What `pattern`'s group captures in its first or last match, or None without a match."""
    found = [m.group(1) for m in re.finditer(score.pattern, output) if m.group(1) is not None]
    if not found:
        return None
    return found[0] if score.match == "first" else found[-1]


def matches(score: ExactMatch, extracted: str | None, target: str) -> bool:
    """Whether `extracted` equals `target` once both are trimmed and cleared of `ignore`."""
    return extracted is not None and _plain(score, extracted) == _plain(score, target)


def _plain(score: ExactMatch, text: str) -> str:
    if score.ignore is not None:
        text = re.sub(score.ignore, "", text)
    text = text.strip()
    return text.casefold() if score.ignore_case else text


def shared_prefix_tokens(context: Sequence[int], candidates: Sequence[Sequence[int]]) -> int:
    """How many leading tokens `context` shares with every one of `candidates`.

    A candidate is context + choice tokenised as one text, and a choice may merge with the
    context's last token (`"a" + "b"` -> `"ab"`). Scoring every choice from the last boundary
    that all of them keep compares the same event, the text after that boundary.
    """
    shared = min(len(context), *(len(c) - 1 for c in candidates))
    for i in range(shared):
        if any(c[i] != context[i] for c in candidates):
            return i
    return shared


def pick_choice(
    score: LoglikelihoodChoice, choices: Sequence[str], logprobs: Sequence[ChoiceLogprob]
) -> int:
    """The index of the likeliest choice, the first of equals.

    `normalise` divides each logprob by the scored tokens, or by the choice's UTF-8 bytes.
    """

    def value(i: int) -> float:
        logprob = logprobs[i].logprob
        if logprob is None:
            return -math.inf
        if score.normalise == "tokens":
            return logprob / logprobs[i].tokens
        if score.normalise == "bytes":
            return logprob / max(1, len(choices[i].encode()))
        return logprob

    return max(range(len(choices)), key=value)


def standard_error(mean: float, n: int) -> float:
    """The binomial standard error of a share `mean` over `n` lines; 0 for none."""
    return math.sqrt(mean * (1 - mean) / n) if n else 0.0
