"""The records that `ingress/sampler_limits.py` looks at are SGLang's, and pass as it makes them."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest

from conserve_sgl.ingress.sampler_limits import check_request

VOCAB = 100
GENERATE: dict[str, Any] = {
    "rid": "a",
    "input_text": "hi",
    "input_ids": array("q", [5, 6]),
    "input_embeds": None,
    "mm_inputs": None,
    "token_type_ids": None,
    "return_logprob": False,
    "logprob_start_len": -1,
    "top_logprobs_num": 0,
    "token_ids_logprob": None,
    "stream": False,
}


def sampling(**params: Any) -> Any:
    from sglang.srt.sampling.sampling_params import SamplingParams

    made = SamplingParams(**params)
    made.normalize(None)
    return made


def generate(**fields: Any) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    fields = {"sampling_params": sampling()} | fields
    return TokenizedGenerateReqInput(**GENERATE | fields)


def embedding(**fields: Any) -> Any:
    from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput

    names = ("rid", "input_text", "input_ids", "mm_inputs", "token_type_ids")
    kept = {name: GENERATE[name] for name in names}
    return TokenizedEmbeddingReqInput(sampling_params=sampling(), **kept | fields)


def test_the_fields_that_are_looked_at_are_there():
    for record, names in (
        (generate(), {"logprob_start_len", "top_logprobs_num", "session_params"}),
        (embedding(), {"input_ids", "mm_inputs"}),
        (sampling(), {"top_k", "min_new_tokens", "stop_token_ids", "logit_bias", "temperature"}),
    ):
        assert names <= {field.name for field in msgspec.structs.fields(record)}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0},
        {"stop_token_ids": [1, 10**6]},
        {"logit_bias": {"5": 1}, "custom_params": {"a": [1]}, "regex": "a*", "top_k": -1},
    ],
)
def test_what_sglang_makes_of_a_plain_request_passes(params):
    check_request(generate(sampling_params=sampling(**params)), VOCAB)
    check_request(embedding(), VOCAB)
    check_request(generate(priority=3, token_ids_logprob=[1], return_logprob=True), VOCAB)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"positional_embed_overrides": {"a": 1}}, "positional_embed_overrides"),
        ({"logprob_start_len": [0]}, "logprob_start_len"),
        ({"extra_key": ["a"]}, "extra_key"),
        ({"return_logprob": [True]}, "return_logprob"),
        ({"multi_item_delimiter_indices": ["a"]}, "multi_item_delimiter_indices"),
    ],
)
def test_a_field_of_another_type_is_refused(fields, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        check_request(generate(**fields), VOCAB)
