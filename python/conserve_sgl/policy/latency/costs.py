"""What a step takes: a sum of a few named costs, and the numbers that they are multiplied by.

The step time is linear in the work but for knees where a step turns from one regime into another;
ConServe (arXiv 2410.01228v2) and Sarathi fit the same form without the knees. Tokens have knees of
both kinds: the first may be dearer (a CPU turns from memory bound to compute bound), and those
beyond a few hundred may be (a GPU computes the first ones while it reads the weights, and while the
host launches the step).
"""

from __future__ import annotations

import msgspec

from conserve_sgl.policy.latency.work import StepWork

__all__ = [
    "DECODE_KNEE_ROWS",
    "PREFILL_KNEE_TOKENS",
    "WIDE_KNEES_TOKENS",
    "Coefficients",
    "features",
    "tokens_s",
]

PREFILL_KNEE_TOKENS = 128
WIDE_KNEES_TOKENS = (256, 512, 1024)
DECODE_KNEE_ROWS = 8


class Coefficients(msgspec.Struct, frozen=True):
    """The costs of a step, in seconds; all at least 0. Their order is that of `features`.

    Args:
        step: of any step.
        prefill: of a step with a prompt in it.
        prompt: of each prompt.
        token: of each token of a step with a prompt in it, those of the rows included.
        early_token: of each of the first PREFILL_KNEE_TOKENS of them, on top.
        wide_token: of each beyond the first of WIDE_KNEES_TOKENS, on top.
        wider_token: of each beyond the second.
        widest_token: of each beyond the third.
        attention: of each query-key pair of a prompt.
        decode: of a step with decode rows in it.
        batch: of a step with two decode rows or more, on top: one row multiplies vectors.
        row: of each decode row.
        early_row: of each of the first DECODE_KNEE_ROWS decode rows, on top.
        context: of each token of KV that a decode row reads.
        mixed: of a step with both, on top.
        mixed_row: of each decode row that runs beside a prompt, on top.
        mixed_context: of each token of KV that such a row reads, on top: a kernel made for prompts
            may compute a whole tile of queries for it.
    """

    step: float = 0.0
    prefill: float = 0.0
    prompt: float = 0.0
    token: float = 0.0
    early_token: float = 0.0
    wide_token: float = 0.0
    wider_token: float = 0.0
    widest_token: float = 0.0
    attention: float = 0.0
    decode: float = 0.0
    batch: float = 0.0
    row: float = 0.0
    early_row: float = 0.0
    context: float = 0.0
    mixed: float = 0.0
    mixed_row: float = 0.0
    mixed_context: float = 0.0


def features(work: StepWork) -> list[float]:
    """What each of `Coefficients` is multiplied by, in their order."""
    tokens, rows = work.prefill_tokens, work.decode_rows
    together = tokens + rows if tokens else 0
    return [
        1.0,
        float(tokens > 0),
        float(work.prompts),
        float(together),
        float(min(together, PREFILL_KNEE_TOKENS)),
        *(float(max(together - knee, 0)) for knee in WIDE_KNEES_TOKENS),
        float(work.prefill_attention),
        float(rows > 0),
        float(rows > 1),
        float(rows),
        float(min(rows, DECODE_KNEE_ROWS)),
        float(work.decode_context),
        float(tokens > 0 and rows > 0),
        float(rows if tokens else 0),
        float(work.decode_context if tokens else 0),
    ]


def tokens_s(k: Coefficients, tokens: int) -> float:
    """The part of a step's time that its tokens make, rows included; not in a decode step."""
    seconds = k.token * tokens
    seconds += k.early_token * (tokens if tokens < PREFILL_KNEE_TOKENS else PREFILL_KNEE_TOKENS)
    wide, wider, widest = WIDE_KNEES_TOKENS
    if tokens > wide:
        seconds += k.wide_token * (tokens - wide)
        if tokens > wider:
            seconds += k.wider_token * (tokens - wider)
            if tokens > widest:
                seconds += k.widest_token * (tokens - widest)
    return seconds
