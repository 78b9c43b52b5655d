"""Jobs, deadlines and metrics on the real engine: one offline request at a time, so order shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from conserve_sgl.engine.metrics import ARRIVAL_LATENCY, METRICS
from support.prometheus import Prometheus, needs_prometheus
from support.server import OFFLINE, until

pytestmark = pytest.mark.engine

CONFIG = """
offline: {queue_requests: 24, no_deadline_share: 0}
status: {enabled: true}
"""
FLAGS = (
    "--max-running-requests=2",
    "--enable-metrics",
    "--enable-custom-logit-processor",
    "--sleep-on-idle",  # the harder case for what is written while nothing runs
)
PROMPT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def server(start_server, tiny_llama) -> Iterator:
    with start_server(tiny_llama, *FLAGS, config=CONFIG) as server:
        yield server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(24) as pool:
        yield pool


LABELS = {metric.label for metric in METRICS} - {None}
MOVING = (
    "latency",
    "spare",
    "offline_bound_s",
    "offline_tokens_per_s",
    "offline_alone",
    "online_s",
)
"""Keys of what moves with every step, or by the second."""


def samples(server) -> dict[str, dict[str, float]]:
    """`conserve:` and `sglang:` samples of /metrics by name, then by the label of ours or ""."""
    text = server.http.get("/metrics").raise_for_status().text
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("conserve:"):
                assert sample.labels["model_name"]
            label = next((sample.labels[name] for name in LABELS & sample.labels.keys()), "")
            found.setdefault(sample.name, {})[label] = sample.value
    return found


def in_queue(server, pool, *tags: dict[str, str], first_tokens: int = 400) -> list[Future]:
    """One offline request for each of `tags`, waiting in this order behind one that runs."""
    sampling = {"max_new_tokens": first_tokens, "ignore_eos": True}
    waiting = server.state()["offline_waiting"]
    first = pool.submit(server.generate, "first", sampling_params=sampling, headers=OFFLINE)
    until(lambda: server.state()["offline_running"] == 1)
    futures = [first]
    for i, tag in enumerate(tags):
        futures.append(pool.submit(server.generate, PROMPT, headers=OFFLINE | tag))
        until(lambda n=i: server.state()["offline_waiting"] == waiting + n + 1)
    return futures


def test_what_is_done_is_no_longer_shown_as_running_though_the_engine_sleeps(server):
    for n in range(1, 4):
        server.generate(PROMPT, headers=OFFLINE)
        # Only this is read: /server_info would wake the engine.
        until(lambda n=n: samples(server)["conserve:offline_finished_total"][""] == n)
        assert samples(server)["conserve:offline_running_reqs"][""] == 0
    state = server.state()
    assert (state["offline_running"], state["offline_finished"]) == (0, 3)


def test_every_metric_is_scraped_and_says_what_the_state_says(server):
    before = server.state()
    server.generate(PROMPT)
    answer = server.generate(PROMPT, headers=OFFLINE)["meta_info"]
    until(lambda: server.state()["offline_finished"] == before["offline_finished"] + 1)
    state = server.state()
    assert state["offline_tokens"]["output"] - before["offline_tokens"]["output"] == 16
    prompt_tokens = sum(
        state["offline_tokens"][kind] - before["offline_tokens"][kind]
        for kind in ("computed", "cached")
    )
    assert prompt_tokens == answer["prompt_tokens"]

    finished = state["offline_finished"]
    until(lambda: samples(server)["conserve:offline_finished_total"][""] == finished)
    found = samples(server)
    for metric in METRICS:
        value = metric.value_in(state)
        expected = value if metric.label else {"": value}
        if metric.key.startswith(MOVING):
            assert set(found.get(metric.name, ())) == set(expected), metric.name
        else:
            assert found[metric.name] == expected, metric.name
    assert found[f"{ARRIVAL_LATENCY.name}_count"][""] == state["arrivals_received"] >= 1
    assert found["conserve:offline_http_refused_total"][""] == 0
    assert "sglang:num_queue_reqs" in found


VARIABLES = {"$model": ".*", "$priority": ".*"}
COMPARISON = re.compile(r" (==|!=|<=|>=|<|>) ")


def board_of(checkout) -> tuple[list[str], list[str]]:
    """The expressions of the board, and the queries of its variables."""
    board = json.loads((checkout / "docs" / "grafana.json").read_text())
    exprs = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    for name, value in VARIABLES.items():
        exprs = [expr.replace(name, value) for expr in exprs]
    assert not [expr for expr in exprs if "$" in expr]
    queries = [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    return exprs, queries


@needs_prometheus
def test_every_query_of_the_board_and_every_alert_finds_data_in_a_real_prometheus(
    server, pool, checkout, tmp_path
):
    exprs, queries = board_of(checkout)
    alerts = yaml.safe_load((checkout / "docs" / "alerts.yaml").read_text())["groups"][0]["rules"]
    # A comparison that does not hold leaves nothing: as a number it leaves 0.
    exprs += [COMPARISON.sub(r" \1 bool ", rule["expr"]) for rule in alerts]
    missing = list(exprs)
    with Prometheus(server.base_url, checkout / "docs" / "alerts.yaml", tmp_path) as prometheus:

        def serve() -> None:
            """Online requests beside offline ones of which some wait."""
            beside = in_queue(server, pool, {}, {})
            for _ in range(3):
                server.generate(PROMPT)
            for future in beside:
                future.result()

        while missing:  # rates need two looks at what counts up, and some what was not there before
            serve()
            missing = [expr for expr in missing if not prometheus.numbers(expr)]
        for query in queries:
            selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()
            known = prometheus.label_values(label, selector)
            assert known or label == "priority", query  # --enable-priority-scheduling is not on

        rules = prometheus.rules()
        assert sorted(rules) == sorted(rule["alert"] for rule in alerts)
        assert {name: rule.get("lastError") for name, rule in rules.items()} == dict.fromkeys(rules)
        assert rules["ConserveOfflinePaused"]["state"] == "inactive"
        server.set_internal_state({"conserve_offline": 0})
        until(lambda: prometheus.rules()["ConserveOfflinePaused"]["state"] == "pending")
        server.set_internal_state({"conserve_offline": 1})
        until(lambda: prometheus.rules()["ConserveOfflinePaused"]["state"] == "inactive")
    server.assert_idle_and_balanced()


def test_answers_to_offline_work_say_what_else_would_be_taken(server, pool):
    def said(headers: dict[str, str]) -> str | None:
        answer = server.http.post("/generate", headers=headers, json={"text": PROMPT})
        return answer.raise_for_status().headers.get("x-sgl-conserve-spare")

    until(lambda: said(OFFLINE) is not None)
    assert int(said(OFFLINE)) > 1
    assert said({}) is None
    futures = in_queue(server, pool, {}, {}, {}, {}, {}, {})
    until(lambda: samples(server)["conserve:offline_spare_reqs"][""] == 0)
    assert server.state()["spare"]["requests"] == 0
    for future in futures:
        future.result()
    server.assert_idle_and_balanced()


def test_the_backlog_shows_in_the_metrics_and_not_in_those_of_online_load(server, pool):
    tags = [{"x-sgl-conserve-job": "a"}, {"x-sgl-conserve-job": "b"}, {}]
    arrived = samples(server)["conserve:online_arrivals_total"][""]
    futures = in_queue(server, pool, *tags)
    until(lambda: samples(server)["conserve:offline_queue_reqs"][""] == 3)
    found = samples(server)
    assert found["conserve:offline_queue_jobs"][""] == 3
    assert found["conserve:offline_running_reqs"][""] == 1
    assert found["conserve:offline_oldest_wait_seconds"][""] > 0
    # What deploy/autoscaling-* go by.
    assert found["conserve:online_arrivals_total"][""] == arrived
    assert found["sglang:num_queue_reqs"][""] == 0
    for future in futures:
        future.result()
    server.assert_idle_and_balanced()


def test_the_earliest_deadline_is_served_first(server, pool):
    left_s = [None, "5000", "60", "600"]
    tags = [{"x-sgl-conserve-deadline-s": s} if s else {} for s in left_s]
    _, *answers = [future.result() for future in in_queue(server, pool, *tags)]
    # As the server has it: the clients' threads may learn of two at once.
    done_at_s = [answer["meta_info"]["request_finished_ts"] for answer in answers]
    assert sorted(range(4), key=done_at_s.__getitem__) == [2, 3, 1, 0]


def test_a_deadline_that_is_missed_is_counted(server):
    before = server.state()["offline_deadline_missed"]
    server.generate(PROMPT, headers=OFFLINE | {"x-sgl-conserve-deadline-s": "-1"})
    server.generate(PROMPT, headers=OFFLINE | {"x-sgl-conserve-deadline-s": "3600"})
    until(lambda: server.state()["offline_deadline_missed"] > before)
    assert server.state()["offline_deadline_missed"] == before + 1


@pytest.mark.parametrize("with_processor", [False, True], ids=["plain", "custom processor"])
def test_the_tag_changes_no_token_and_no_processor_sees_it(server, with_processor):
    body: dict = {}
    if with_processor:
        from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

        # It fails when two requests' parameters differ in its key, and reads no other.
        body["custom_logit_processor"] = DisallowedTokensLogitsProcessor.to_str()
        body["sampling_params"] = {"custom_params": {"token_ids": [40, 41, 42]}}
    online = server.generate(PROMPT, **body)["text"]
    tags = OFFLINE | {"x-sgl-conserve-job": "nightly", "x-sgl-conserve-deadline-s": "60"}
    assert server.generate(PROMPT, headers=tags, **body)["text"] == online
    both = {"n": 2, "temperature": 0.0, "max_new_tokens": 16}
    sampling = {**both, **body.pop("sampling_params", {})}
    many = server.http.post(
        "/generate",
        headers=tags,
        json={"text": [PROMPT, PROMPT], "sampling_params": sampling, **body},
    )
    assert [one["text"] for one in many.raise_for_status().json()] == [online] * 4


def test_a_tag_that_cannot_be_used_is_answered_400(server):
    headers = OFFLINE | {"x-sgl-conserve-deadline-s": "tomorrow"}
    answer = server.http.post("/generate", headers=headers, json={"text": PROMPT})
    assert answer.status_code == 400
    assert "x-sgl-conserve-deadline-s" in answer.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_back_and_counts_it(server):
    body = {"text": "x", "sampling_params": {"max_new_tokens": 32}}

    def post():
        return server.http.post("/generate", headers=OFFLINE, json=body)

    with ThreadPoolExecutor(40) as many:
        answers = [f.result() for f in [many.submit(post) for _ in range(40)]]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 40 - sum(answer.status_code == 200 for answer in answers) > 0
    assert all(5 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert samples(server)["conserve:offline_http_refused_total"][""] == len(refused)
    server.assert_idle_and_balanced()


@pytest.mark.parametrize("headers", [OFFLINE, {}], ids=["offline", "online"])
def test_an_abort_ends_the_request_of_that_id_and_none_that_begins_so(server, pool, headers):
    def ask(rid: str) -> Future:
        params = {"max_new_tokens": 600, "ignore_eos": True}
        text = f"{PROMPT} {rid}"
        return pool.submit(server.generate, text, rid=rid, sampling_params=params, headers=headers)

    with server.slow_steps(0.02):
        asked = {rid: ask(rid) for rid in ("job-1", "job-10", "job-11", "job-12")}
        while not asked["job-1"].done():  # it may be on its way to the scheduler still
            server.http.post("/abort_request", json={"rid": "job-1"}).raise_for_status()
    endings = {rid: f.result()["meta_info"]["finish_reason"]["type"] for rid, f in asked.items()}
    assert endings == {"job-1": "abort", "job-10": "length", "job-11": "length", "job-12": "length"}
    server.assert_idle_and_balanced()


def test_a_client_that_leaves_takes_its_request_out_of_the_queue_at_once(server, pool):
    aborted = server.state()["offline_aborted"]
    futures = in_queue(server, pool, {}, first_tokens=2000)
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/offline/generate", json={"text": PROMPT}, timeout=1)
    until(lambda: server.state()["offline_aborted"] == aborted + 1)
    assert server.state()["offline_waiting"] == 1
    assert server.state()["offline_running"] == 1
    server.http.post("/abort_request", json={"abort_all": True}).raise_for_status()
    for future in futures:
        assert future.exception() or future.result()
    server.assert_idle_and_balanced()
