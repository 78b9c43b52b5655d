"""What SGLang's scheduler takes for granted of a request, and ends on where it is not so.

It takes the types of fields on trust, puts numbers into tensors of 32 bits, and indexes tensors as
wide as the vocabulary with them. What does not fit raises there, and with the scheduler goes the
server, with every request in it. Here it is that one request's 400, online or offline, before
anything was sent to the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np

__all__ = ["check_request", "check_samples"]

MOST_SAMPLES = 16_384
"""Of one HTTP request that asks for several of each prompt. Each is made at once, in the process
that serves everybody: ten million of them stop it."""

_MOST_INT32 = 2**31 - 1
_MOST_FLOAT = 1e30
"""float32 ends at 3.4e38. Logits are divided by a temperature of 1e-6 at least, and must not then
be infinite: infinities turn into probabilities that are no numbers."""
_FLOAT_RANGES = {
    "temperature": (0.0, _MOST_FLOAT),
    "top_p": (1e-30, 1.0),
    "repetition_penalty": (1e-6, 2.0),
}
"""By name of the sampling parameter. Within SGLang's own ranges, but for what float32 makes 0."""

_OF_JSON = (bool, int, float, str, list, dict)
_NOT_A_CLIENT_S = frozenset(
    {"input_embeds", "input_ids", "input_text", "mm_inputs", "num_items_assigned", "time_stats"}
)
"""Fields that SGLang made itself, and large ones that it checked."""
_FREE_FORM = frozenset({"custom_params", "watermark"})


def check_request(request: Any, vocab_size: int) -> None:
    """Refuse what would end the scheduler.

    Args:
        request: SGLang's tokenized request for one prompt, of text to generate or to embed.
        vocab_size: tokens of the model's vocabulary.

    Raises:
        ValueError: naming the field, as the clients know it, and its limits; SGLang's routes
            answer it with 400.
    """
    _check_types(request, _NOT_A_CLIENT_S)
    _check_types(request.sampling_params, _FREE_FORM)
    _check_prompt(request, vocab_size)
    if hasattr(request, "top_logprobs_num"):  # requests for embeddings have no logprobs
        _check_range("logprob_start_len", request.logprob_start_len, -1, _MOST_INT32)
        top = request.top_logprobs_num
        _check_range("top_logprobs, logprobs or top_logprobs_num", top, 0, vocab_size)
    _check_sampling(request.sampling_params, vocab_size)


def check_samples(prompts: int, samples: int) -> None:
    """Refuse more samples than one request may ask for.

    Args:
        prompts: of the request.
        samples: of each prompt.

    Raises:
        ValueError: naming field and limit.
    """
    if samples > 1 and prompts * samples > MOST_SAMPLES:
        raise ValueError(f"n: {samples} samples of {prompts} prompts are more than {MOST_SAMPLES}")


def _check_types(record: msgspec.Struct, but_for: frozenset[str]) -> None:
    """Whether the values that JSON can hold are of the types that SGLang's record declares."""
    for name, type_, default in _fields(type(record)):
        value = getattr(record, name)
        if value is default or name in but_for or not isinstance(value, _OF_JSON):
            continue
        try:
            msgspec.convert(value, type_)
        except msgspec.ValidationError as e:
            raise ValueError(f"{name}: {str(e)[:1].lower()}{str(e)[1:]}") from e


@cache
def _fields(record: type[msgspec.Struct]) -> list[tuple[str, Any, Any]]:
    return [(f.name, f.type, f.default) for f in msgspec.structs.fields(record)]


def _check_prompt(request: Any, vocab_size: int) -> None:
    if request.mm_inputs is not None:  # placeholders of images are no tokens
        return
    is_text = getattr(request, "input_embeds", None) is None
    if is_text and not request.input_ids and not getattr(request, "session_params", None):
        raise ValueError("prompt, text or input: it has no tokens")
    _check_tokens("prompt, input_ids or input", request.input_ids, vocab_size)


def _check_sampling(params: Any, vocab_size: int) -> None:
    for name, (low, high) in _FLOAT_RANGES.items():
        _check_range(name, getattr(params, name), low, high)
    _check_range("top_k", params.top_k, 1, _MOST_INT32)
    _check_range("min_new_tokens or min_tokens", params.min_new_tokens, 0, _MOST_INT32)
    if params.min_new_tokens:  # only then are they looked up
        _check_tokens("stop_token_ids", list(params.stop_token_ids or ()), vocab_size)
    for token, bias in (params.logit_bias or {}).items():
        if not abs(bias) <= _MOST_FLOAT:  # what is no number is not less either
            limits = f"from {-_MOST_FLOAT} to {_MOST_FLOAT}"
            raise ValueError(f"logit_bias: {bias} for token {token} is not {limits}")


def _check_range(name: str, number: float | None, low: float, high: float) -> None:
    if number is None or not low <= number <= high:
        raise ValueError(f"{name}: {number} is not from {low} to {high}")


def _check_tokens(name: str, tokens: Sequence[int] | None, vocab_size: int) -> None:
    if not tokens:
        return
    ids = np.asarray(tokens)
    for token in (int(ids.min()), int(ids.max())):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{name}: token id {token} is outside the vocabulary, 0 to {vocab_size - 1}"
            )
