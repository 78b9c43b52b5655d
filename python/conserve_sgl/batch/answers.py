"""What an answer with status 200 says of itself: whether it is one, and what it used."""

from __future__ import annotations

import msgspec

from conserve_sgl.batch.schema import InputDetails, OutputDetails, Usage

__all__ = ["fault_of", "usage_of"]

_BROKEN_OFF = ("abort", "error")
# An answer that ended at its own max_output_tokens is whole, as with finish_reason "length".
_WHOLE = ("completed", "incomplete")


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: object = None


class _Outcome(msgspec.Struct, frozen=True):
    """How it ended: `choices` in chat and text completions, `status` in responses."""

    choices: list[_Choice] | None = None
    status: object = None
    error: object = None


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    """Usage in an answer of any of the endpoints."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Answer(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


_decode_outcome = msgspec.json.Decoder(_Outcome).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode


def fault_of(body: bytes) -> str | None:
    """Why `body`, sent with status 200, is no whole answer all the same; None when it is one.

    The engine may let go of a request before it is done, and then the routes say so in three ways:
    a `finish_reason`, a `status` that is none of an ended response, an `error`.
    """
    try:
        outcome = _decode_outcome(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        return f"the answer is not one of this route: {e}"
    reasons = [choice.finish_reason for choice in outcome.choices or []]
    if outcome.error:
        return f"the answer is an error: {_message(outcome.error)}"
    if isinstance(outcome.status, str) and outcome.status not in _WHOLE:
        return f"the answer's status is {outcome.status}"
    if any(reason in _BROKEN_OFF for reason in reasons):
        return "aborted by the server"
    return None


def usage_of(body: bytes) -> Usage:
    """The tokens that an answer says it used; what it does not say counts as 0."""
    try:
        usage = _decode_answer(body).usage or _Usage()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Usage()
    taken = usage.input_tokens or usage.prompt_tokens or 0
    given = usage.output_tokens or usage.completion_tokens or 0
    details_in = usage.input_tokens_details or usage.prompt_tokens_details or _Details()
    details_out = usage.output_tokens_details or usage.completion_tokens_details or _Details()
    reasoning = details_out.reasoning_tokens or usage.reasoning_tokens or 0
    return Usage(
        input_tokens=taken,
        input_tokens_details=InputDetails(cached_tokens=details_in.cached_tokens or 0),
        output_tokens=given,
        output_tokens_details=OutputDetails(reasoning_tokens=reasoning),
        total_tokens=taken + given,
    )


def _message(error: object) -> object:
    return (error.get("message") or error) if isinstance(error, dict) else error
