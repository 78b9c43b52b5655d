"""Requests that end a stock SGLang 0.5.23, each tried on one: here each is its own 400."""

from __future__ import annotations

import re
from typing import Any

import pytest

from support.server import OFFLINE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

VOCAB = 260
COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 2}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TOKENS = "token id -?[0-9]+ is outside the vocabulary, 0 to 259"


def generate(*, params: dict[str, Any] | None = None, **fields: Any) -> tuple[str, dict[str, Any]]:
    prompt = {} if {"text", "input_ids"} & set(fields) else {"text": "hi"}
    sampling = {"max_new_tokens": 2} | (params or {})
    return "/generate", {**prompt, **fields, "sampling_params": sampling}


def complete(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", COMPLETION | fields


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", CHAT | fields


DEADLY = [
    (generate(input_ids=[-1, 5]), TOKENS),
    (generate(input_ids=[[5, 6], [VOCAB]]), TOKENS),
    (complete(prompt=[-1, 5]), TOKENS),
    (complete(prompt=[[5], [99999]]), TOKENS),
    (chat(input_ids=[-1]), TOKENS),
    (generate(text=""), "it has no tokens"),
    (generate(input_ids=[[5, 6], []]), "it has no tokens"),
    (generate(return_logprob=True, top_logprobs_num=99999), "top_logprobs_num: 99999"),
    (generate(return_logprob=True, top_logprobs_num=[2]), "top_logprobs_num: expected"),
    (complete(logprobs=99999), "logprobs or top_logprobs_num: 99999 is not from 0 to 260"),
    (chat(logprobs=True, top_logprobs=99999), "top_logprobs, .*: 99999 is not from 0 to 260"),
    (generate(return_logprob=True, logprob_start_len=-5), "logprob_start_len: -5"),
    (generate(return_logprob=True, logprob_start_len=[0]), "logprob_start_len: expected"),
    (generate(positional_embed_overrides=5), "positional_embed_overrides: expected"),
    (generate(params={"top_k": 2**40}), "top_k: 1099511627776 is not from 1 to 2147483647"),
    (generate(params={"min_new_tokens": 1, "stop_token_ids": [10**6]}), "stop_token_ids: token"),
    (complete(min_tokens=1, stop_token_ids=[-300]), "stop_token_ids: token"),
    (chat(min_tokens=1, stop_token_ids=[99999]), "stop_token_ids: token"),
    (complete(n=10**7), "n: 10000000 samples of 1 prompts are more than 16384"),
]


@pytest.mark.parametrize("headers", [{}, OFFLINE], ids=["online", "offline"])
def test_a_request_that_would_end_the_engine_is_its_own_400(plain_server, headers):
    for (path, body), reason in DEADLY:
        answer = plain_server.http.post(path, json=body, headers=headers)
        assert answer.status_code == 400, (path, body, answer.text)
        assert re.search(reason, answer.text), (path, body, answer.text)
    assert plain_server.generate("still here")["text"]
    plain_server.assert_idle_and_balanced()


def test_a_priority_is_any_integer_of_64_bits(plain_server):
    for priority in (2**63 - 1, -(2**63), 2**40, 0):
        assert plain_server.generate("urgent", priority=priority)["text"]
    for priority in (2**63, -(2**63) - 1, 10**30):
        answer = plain_server.http.post("/generate", json={"text": "a", "priority": priority})
        assert answer.status_code == 400
        assert "priority" in answer.text
    plain_server.assert_idle_and_balanced()


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ({"headers": {"x-sgl-conserve-deadline-s": "-1e308"}}, "x-sgl-conserve-deadline-s"),
        ({"headers": {"x-sgl-conserve-deadline-s": "1e999"}}, "x-sgl-conserve-deadline-s"),
        ({"metadata": {"conserve_deadline_s": -1e308}}, "metadata.conserve_deadline_s"),
        ({"metadata": {"conserve_job": "a" * 200}}, "metadata.conserve_job"),
    ],
)
def test_a_tag_that_nobody_means_is_its_own_400(plain_server, where, name):
    body = CHAT | {"metadata": where.get("metadata")}
    headers = OFFLINE | where.get("headers", {})
    answer = plain_server.http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 400
    assert f"{name}: must be " in answer.json()["message"]
    for deadline in ("-10000000000", "1e10", "5e-324", "-0.0"):
        headers = OFFLINE | {"x-sgl-conserve-deadline-s": deadline}
        assert plain_server.generate("on time", headers=headers)["text"]
    plain_server.assert_idle_and_balanced()


def test_settings_that_nobody_means_change_nothing(plain_server):
    before = plain_server.state()["slo"]
    for numbers in (
        {"conserve_tpot_ms": 1e300},
        {"conserve_ttft_x": -1e308},
        {"conserve_yield_ms": 5e300},
        {"conserve_batches": 7},
    ):
        assert plain_server.set_internal_state(numbers) is False
    assert plain_server.state()["slo"] == before
