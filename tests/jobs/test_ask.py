"""What we send is what SGLang's published `/generate` contract takes, and its replies are read."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.client.http import BadReply
from conserve_sgl.jobs.ask import (
    chat_body,
    choice_body,
    choice_logprob,
    generate_body,
    read_chat,
    read_choices,
    read_text,
)
from conserve_sgl.jobs.schema import Sampling

EVERYTHING = Sampling(
    max_new_tokens=7,
    min_new_tokens=1,
    temperature=0.5,
    top_p=0.9,
    top_k=40,
    min_p=0.1,
    frequency_penalty=0.1,
    presence_penalty=0.2,
    repetition_penalty=1.1,
    stop=["\n", "Q:"],
    stop_token_ids=[1, 2],
    seed=3,
    ignore_eos=True,
    regex="a+",
)


@pytest.fixture(scope="module")
def contract() -> ModuleType:
    """SGLang's generated JSON contract, loaded without the rest of SGLang (which takes 20 s)."""
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        pytest.skip("SGLang is not installed")
    path = Path(package.origin).parent / "api" / "v1" / "api_types.py"
    spec = importlib.util.spec_from_file_location("sglang_api_types", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "body",
    [
        generate_body(None, "hello", Sampling()),
        generate_body("m", "hello", EVERYTHING, priority=-1),
        generate_body(
            None, "hello", Sampling(json_schema='{"type": "object"}', stop="x", top_k=-1)
        ),
        choice_body("m", [[1, 2, 3], [1, 2, 4, 5]], 2, priority=-1),
    ],
    ids=["default", "everything", "json_schema", "choices"],
)
def test_sglang_takes_our_generate_bodies(contract, body):
    sent = msgspec.json.decode(msgspec.json.encode(body))
    contract.GenerateRequest.from_json_value(sent)


NUMBERS = [
    *("max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
]
EDGES = [10**23, -(10**23), 2**63, 2**31, 2**31 - 1, -1, 0, 1, 2, 5e-324, 1e308, math.inf, math.nan]


@given(st.sampled_from(NUMBERS), st.sampled_from(EDGES) | st.integers() | st.floats())
def test_every_number_that_a_job_may_have_is_one_that_sglang_takes(contract, name, value):
    try:
        sampling = msgspec.convert({name: value}, Sampling)
    except msgspec.ValidationError:
        return
    sent = msgspec.json.decode(msgspec.json.encode(generate_body(None, "x", sampling)))
    contract.GenerateRequest.from_json_value(sent)
    number = sent["sampling_params"][{"seed": "sampling_seed"}.get(name, name)]
    assert number == pytest.approx(value)
    assert abs(number) < (1e31 if isinstance(number, float) else 2**63 if name == "seed" else 2**31)


def test_the_contract_would_refuse_an_unknown_sampling_parameter(contract):
    body = {"text": "x", "sampling_params": {"max_tokens": 1}}
    with pytest.raises(contract.JsonContractError, match="max_tokens"):
        contract.GenerateRequest.from_json_value(body)


def test_only_what_is_given_is_sent():
    assert generate_body(None, "p", Sampling()) == {
        "text": "p",
        "sampling_params": {"max_new_tokens": 128, "temperature": 0.0},
    }


def test_chat_names_differ_from_native_ones():
    body = chat_body(None, [], EVERYTHING, {"enable_thinking": False})
    assert "max_new_tokens" not in body
    assert (body["max_completion_tokens"], body["min_tokens"], body["seed"]) == (7, 1, 3)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    schema = Sampling(json_schema='{"type": "object"}')
    assert chat_body(None, [], schema, None)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}},
    }


def text_reply(finish: dict, logprobs: list | None = None) -> bytes:
    meta = {"finish_reason": finish, "prompt_tokens": 3, "completion_tokens": 0, "id": "x"}
    if logprobs is not None:
        meta["input_token_logprobs"] = logprobs
    return msgspec.json.encode({"text": "t", "meta_info": meta, "output_ids": []})


def test_an_aborted_answer_is_no_answer():
    aborted = {"type": "abort", "message": "went away"}
    with pytest.raises(BadReply, match="went away"):
        read_text(text_reply(aborted))
    with pytest.raises(BadReply, match="went away"):
        read_choices(b"[" + text_reply(aborted) + b"]", [2])
    chat = {
        "choices": [{"message": {"content": None}, "finish_reason": "abort"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 0},
    }
    with pytest.raises(BadReply):
        read_chat(msgspec.json.encode(chat))


def test_the_first_logprob_is_the_shared_token_and_does_not_count():
    reply = read_text(text_reply({"type": "length"}, [[None, 5], [-1.5, 6], [-0.25, 7]]))
    scored = choice_logprob(reply)
    assert (scored.logprob, scored.tokens) == (-1.75, 2)


def test_a_token_that_cannot_be_makes_its_choice_impossible():
    reply = read_text(text_reply({"type": "length"}, [[None, 5], [None, 6], [-0.25, 7]]))
    assert choice_logprob(reply).logprob is None


def test_a_reply_without_logprobs_is_bad():
    with pytest.raises(BadReply, match="no logprobs"):
        read_choices(b"[" + text_reply({"type": "length"}) + b"]", [2])


@pytest.mark.parametrize("tokens", [[1], [3], [2, 2], []])
def test_a_reply_with_another_number_of_logprobs_is_bad(tokens):
    raw = b"[" + text_reply({"type": "length"}, [[None, 5], [-1.5, 6], [-0.25, 7]]) + b"]"
    assert len(read_choices(raw, [2])) == 1
    with pytest.raises(BadReply, match="logprobs and not"):
        read_choices(raw, tokens)
