"""What is kept of a line that was asked: a record if it has finished, else a failure."""

from __future__ import annotations

import msgspec

from conserve_sgl.jobs.score import ChoiceLogprob

__all__ = ["Failure", "Record"]


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A finished line, as it stands in `<task>.jsonl`. `latency_s` includes waits and retries."""

    id: str
    line: int
    output: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    done_unix_s: float
    attempts: int
    cached_tokens: int | None = None  # None when the server does not say
    reasoning: str | None = None
    score: float | None = None
    extracted: str | None = None
    target: str | int | None = None
    chosen: int | None = None
    choices: list[ChoiceLogprob] | None = None
    prompt: str | list[dict[str, str]] | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A line that failed, as it stands in `<task>.errors.jsonl`; no reply, no `status`."""

    id: str
    line: int
    status: int | None
    error: str
    attempts: int
