"""Requests that would end SGLang's scheduler, told by records like SGLang's.

`tests/engine/test_deadly_requests.py` sends such requests to a server.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.ingress.sampler_limits import MOST_SAMPLES, check_request, check_samples

VOCAB = 100


class Params(msgspec.Struct, kw_only=True):
    """SamplingParams, as far as it matters here."""

    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    top_k: int = 1 << 30
    min_new_tokens: int = 0
    stop_token_ids: set[int] | None = None
    logit_bias: dict[str, float] | None = None
    json_schema: str | None = None
    custom_params: Any = None


class Generate(msgspec.Struct, kw_only=True):
    """TokenizedGenerateReqInput, likewise."""

    input_ids: array | None = None
    input_embeds: Any = None
    mm_inputs: Any = None
    sampling_params: Params = msgspec.field(default_factory=Params)
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    priority: int | None = None
    session_params: Any = None
    positional_embed_overrides: array | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """TokenizedEmbeddingReqInput, likewise."""

    input_ids: array | None = None
    mm_inputs: Any = None
    sampling_params: Params = msgspec.field(default_factory=Params)
    priority: int | None = None


def ids(*tokens: int) -> array:
    return array("q", tokens)


def generate(**fields: Any) -> Generate:
    return Generate(**{"input_ids": ids(0, VOCAB - 1), **fields})


def sampling(**params: Any) -> Generate:
    return generate(sampling_params=Params(**params))


def check(request: Any) -> None:
    check_request(request, VOCAB)


@pytest.mark.parametrize(
    "request_",
    [
        generate(),
        generate(top_logprobs_num=VOCAB, logprob_start_len=0, priority=2**62),
        generate(input_ids=ids(), session_params={"id": "a"}),
        generate(input_ids=None, input_embeds=[[0.5]]),
        generate(input_ids=ids(-1), mm_inputs=object()),
        sampling(top_k=1, temperature=1e30, top_p=1e-30, repetition_penalty=1e-6),
        sampling(min_new_tokens=2, stop_token_ids={0, VOCAB - 1}),
        sampling(stop_token_ids={VOCAB}),  # compared with, and nothing else
        sampling(logit_bias={"5": -1e9, "6": 1}),
        sampling(custom_params={"a": {"b": [1]}}),
        Embedding(input_ids=ids(5)),
    ],
)
def test_what_the_scheduler_can_do_passes(request_):
    check(request_)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (generate(input_ids=ids(5, -1)), "prompt, input_ids or input: token id -1 is outside"),
        (generate(input_ids=ids(VOCAB)), "token id 100 is outside the vocabulary, 0 to 99"),
        (Embedding(input_ids=ids(VOCAB)), "token id 100 is outside the vocabulary, 0 to 99"),
        (generate(input_ids=ids()), "prompt, text or input: it has no tokens"),
        (Embedding(input_ids=ids()), "prompt, text or input: it has no tokens"),
        (generate(top_logprobs_num=VOCAB + 1), "top_logprobs.*: 101 is not from 0 to 100"),
        (generate(top_logprobs_num=-1), "top_logprobs.*: -1 is not from 0 to 100"),
        (generate(top_logprobs_num=[2]), "top_logprobs_num: expected `int`, got `array`"),
        (generate(top_logprobs_num=None), "top_logprobs.*: None is not from"),
        (generate(logprob_start_len=-5), "logprob_start_len: -5 is not from -1"),
        (generate(logprob_start_len=[0]), "logprob_start_len: expected `int`, got `array`"),
        (generate(positional_embed_overrides={"a": 1}), "positional_embed_overrides: expected"),
        (generate(positional_embed_overrides=5), "positional_embed_overrides: expected"),
        (sampling(top_k=2**31), "top_k: 2147483648 is not from 1 to 2147483647"),
        (sampling(min_new_tokens=2**40), "min_new_tokens or min_tokens: 1099511627776"),
        (sampling(min_new_tokens=1, stop_token_ids={VOCAB}), "stop_token_ids: token id 100"),
        (sampling(min_new_tokens=1, stop_token_ids={-1}), "stop_token_ids: token id -1"),
        (sampling(logit_bias={"5": math.inf}), "logit_bias: inf for token 5"),
        (sampling(logit_bias={"5": math.nan}), "logit_bias: nan for token 5"),
        (sampling(logit_bias={"5": 1e308}), "logit_bias: 1e.308 for token 5"),
        (sampling(logit_bias=[5]), "logit_bias: expected `object"),
        (sampling(temperature=1e308), "temperature: 1e.308 is not from"),
        (sampling(repetition_penalty=1e-300), "repetition_penalty: 1e-300 is not from 1e-06"),
        (sampling(top_p=1e-300), "top_p: 1e-300 is not from 1e-30"),
        (sampling(json_schema={"type": "object"}), "json_schema: expected `str"),
    ],
)
def test_what_would_end_it_is_refused_by_its_name(request_, reason):
    with pytest.raises(ValueError, match=reason):
        check(request_)


NUMBERS = st.floats() | st.integers() | st.integers(10**300, 10**310)


@given(
    field=st.sampled_from(["logprob_start_len", "top_logprobs_num"]),
    param=st.sampled_from(["temperature", "top_p", "repetition_penalty", "top_k"]),
    number=NUMBERS | st.none() | st.text() | st.lists(NUMBERS, max_size=1),
    other=NUMBERS,
)
def test_no_value_raises_anything_else(field, param, number, other):
    request = generate(**{field: number})
    setattr(request.sampling_params, param, other)
    try:
        check(request)
    except ValueError:
        return
    for passed in (number, other):
        assert passed is None or abs(passed) <= 1e30


@pytest.mark.parametrize(
    ("prompts", "samples"), [(1, 1), (10**6, 1), (1, MOST_SAMPLES), (2, MOST_SAMPLES // 2), (1, -1)]
)
def test_samples_that_one_request_may_ask_for(prompts, samples):
    check_samples(prompts, samples)


@pytest.mark.parametrize(("prompts", "samples"), [(1, 10**7), (2, MOST_SAMPLES)])
def test_samples_that_would_stop_the_process_of_everybody(prompts, samples):
    with pytest.raises(ValueError, match=f"n: {samples} samples of {prompts} prompts are more"):
        check_samples(prompts, samples)
