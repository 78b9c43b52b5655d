"""Unchanged clients, and every tag that makes a request offline, on a real server."""

from __future__ import annotations

import json
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 4}
GENERATE = {"text": "hi", "sampling_params": {"max_new_tokens": 4}}
ROUTES = {
    "/generate": GENERATE,
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
}
OFFLINE_HEADERS = [{"x-sgl-conserve-class": "offline"}, {"x-smg-priority": "bulk"}]
ONLINE_TAGS = [
    {},
    {"priority": 0},
    {"priority": 7},
    {"service_tier": "default"},
    {"service_tier": "auto"},
    {"service_tier": "priority"},
]


@pytest.fixture
def server(plain_server):
    return plain_server


def _class_of(server, path: str, body: dict, headers: dict | None = None) -> str:
    before = server.offline_accepted()
    server.http.post(path, json=body, headers=headers).raise_for_status()
    return "offline" if server.offline_accepted() > before else "online"


@pytest.mark.parametrize("route", ROUTES)
class TestEveryRoute:
    def test_path_prefix(self, server, route):
        assert _class_of(server, f"/offline{route}", ROUTES[route]) == "offline"

    @pytest.mark.parametrize("headers", OFFLINE_HEADERS, ids=lambda h: next(iter(h)))
    def test_headers(self, server, route, headers):
        assert _class_of(server, route, ROUTES[route], headers) == "offline"

    def test_service_tier(self, server, route):
        assert _class_of(server, route, ROUTES[route] | {"service_tier": "flex"}) == "offline"

    def test_priority(self, server, route):
        assert _class_of(server, route, ROUTES[route] | {"priority": -100}) == "offline"

    @pytest.mark.parametrize("tag", ONLINE_TAGS, ids=str)
    def test_the_rest_is_online(self, server, route, tag):
        assert _class_of(server, route, ROUTES[route] | tag) == "online"


def test_the_probe_of_the_server_stays_online(server):
    before = server.offline_accepted()
    server.http.get("/offline/health_generate").raise_for_status()
    assert server.offline_accepted() == before


def test_openai_client(server):
    before = server.offline_accepted()
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(**CHAT, service_tier="flex")
        assert (answer.usage.completion_tokens, answer.service_tier) == (4, "flex")
        streamed = list(client.chat.completions.create(**CHAT, service_tier="flex", stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert {chunk.service_tier for chunk in streamed} == {"flex"}
    assert server.offline_accepted() == before + 2


def test_openai_client_reads_the_tier_of_a_response(server):
    asked = {"input": "hi", "max_output_tokens": 4, "service_tier": "flex"}
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
        asked["model"] = client.models.list().data[0].id  # this route takes no other name
        assert client.responses.create(**asked).service_tier == "flex"
        events = list(client.responses.create(**asked, stream=True))
    responses = [event.response for event in events if hasattr(event, "response")]
    assert responses
    assert {response.service_tier for response in responses} == {"flex"}


@pytest.mark.parametrize("route", ROUTES)
def test_a_slash_too_many_stays_offline(server, route):
    before = server.offline_accepted()
    url = f"{server.base_url}/offline{route}/"
    answer = httpx.post(url, json=ROUTES[route], follow_redirects=True, timeout=60)
    assert answer.status_code == 200
    assert server.offline_accepted() == before + 1


def test_openai_client_on_the_offline_base_url(server):
    before = server.offline_accepted()
    with openai.OpenAI(base_url=f"{server.base_url}/offline/v1", api_key="none") as client:
        assert client.models.list().data
        client.completions.create(**COMPLETION)
    assert server.offline_accepted() == before + 1


def test_curl(server):
    before = server.offline_accepted()
    curl = ["curl", "-sf", f"{server.base_url}/v1/completions", "-H", "x-smg-priority: bulk"]
    answer = subprocess.run([*curl, "--json", json.dumps(COMPLETION)], capture_output=True)
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] == 4
    assert server.offline_accepted() == before + 1


def test_frontend_program(server):
    """An `sgl.function` through an unchanged RuntimeEndpoint, on the offline base URL.

    Greedy, and with two different tokens before the select: SGLang 0.5.23's frontend fails on a
    text whose last two tokens read the same (it subtracts a first logprob that is None), and its
    worker thread waits for ever where warnings are errors, since it reports by a warning.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang as sgl

        @sgl.function
        def ask(s, question):
            s += "Q: " + question + "\nA:"
            s += sgl.gen("answer", max_tokens=6, temperature=0)
            s += "\nVerdict: "
            s += sgl.select("verdict", choices=["yes", "no"])

        before = server.offline_accepted()
        backend = sgl.RuntimeEndpoint(f"{server.base_url}/offline")
        states = ask.run_batch([{"question": q} for q in ("one", "two")], backend=backend)
    assert [state.error() for state in states] == [None, None]
    assert all(state["answer"] for state in states)
    assert all(state["verdict"] in ("yes", "no") for state in states)
    assert server.offline_accepted() >= before + 4
    server.assert_idle_and_balanced()


def test_several_samples_and_several_prompts(server):
    before = server.offline_accepted()
    body = {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 4, "n": 2}, "priority": -1}
    assert len(server.http.post("/generate", json=body).json()) == 4
    assert server.offline_accepted() >= before + 4
    server.assert_idle_and_balanced()


def test_logprobs_grammar_and_stops_ride_along(server):
    """Sampling state that a row carries is the same with both classes as alone."""
    bodies = [
        {},
        {"regex": "[a-z]{5,30}"},
        {"stop": ["e"]},
    ]

    def run(sampling: dict, headers: dict | None) -> tuple[str, list[float]]:
        answer = server.generate(
            "tell me",
            sampling_params={"max_new_tokens": 32, **sampling},
            headers=headers,
            return_logprob=True,
        )
        logprobs = answer["meta_info"]["output_token_logprobs"]
        return answer["text"], [logprob for logprob, *_ in logprobs]

    alone = [run(sampling, None) for sampling in bodies]
    with ThreadPoolExecutor(8) as pool:
        offline = [pool.submit(run, sampling, OFFLINE_HEADERS[0]) for sampling in bodies]
        online = [pool.submit(run, sampling, None) for sampling in bodies]
        for results in (offline, online):
            for future, (text, logprobs) in zip(results, alone, strict=True):
                assert future.result() == (text, pytest.approx(logprobs, abs=1e-3))
    server.assert_idle_and_balanced()


def test_penalised_rows_run_beside_others(server):
    """Their running counts belong to a batch, so such a batch is never split."""
    penalty = {"frequency_penalty": 0.7, "max_new_tokens": 48}
    with ThreadPoolExecutor(8) as pool:
        offline = [
            pool.submit(server.generate, p, sampling_params=sampling, headers=OFFLINE_HEADERS[0])
            for p in ("a", "b", "c")
            for sampling in (penalty, {"max_new_tokens": 48})
        ]
        online = [pool.submit(server.generate, p, sampling_params=penalty) for p in ("d", "e")]
        answers = [future.result() for future in offline + online]
    assert {answer["meta_info"]["completion_tokens"] for answer in answers} == {48}
    server.assert_idle_and_balanced()
