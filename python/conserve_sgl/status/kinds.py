"""What a step was, in a few words, and the share of the time that each kind had."""

from __future__ import annotations

from collections.abc import Iterable

from conserve_sgl.status.record import Step

__all__ = ["IDLE", "KINDS", "kind_of", "shares"]

IDLE = "idle"
KINDS = (
    "online prompts",
    "online rows",
    "online and offline rows",
    "offline rows",
    "offline prompts beside rows",
    "offline prompts",
    "offline prompts in slices",
    IDLE,
)


def kind_of(step: Step) -> str:
    """One of KINDS but the last."""
    if step.online_prompt_tokens:
        return "online prompts"
    if step.sliced:
        return "offline prompts in slices"
    if step.offline_prompt_tokens:
        rows = step.online_rows or step.offline_rows
        return "offline prompts beside rows" if rows else "offline prompts"
    if step.online_rows and step.offline_rows:
        return "online and offline rows"
    return "online rows" if step.online_rows else "offline rows"


def shares(steps: Iterable[Step]) -> dict[str, float]:
    """Of the time of these steps and before them, the share of each kind; of KINDS those that
    there were."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for step in steps:
        seconds[kind_of(step)] += step.seconds or 0.0
        seconds[IDLE] += step.idle_s
    total_s = sum(seconds.values())
    return {kind: took_s / total_s for kind, took_s in seconds.items() if took_s}
