"""The hooks and the middleware against SGLang's own request objects and routes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from conserve_sgl.config import ConserveConfig
from conserve_sgl.ingress.classify import OFFLINE_PREFIX
from conserve_sgl.ingress.hooks import Ingress
from conserve_sgl.ingress.middleware import _GENERATING, asked_class
from conserve_sgl.policy import PriorityRule, ServiceClass


class Sender:
    """Stands where the arrival channel's sender does."""

    def __init__(self, _endpoint: str) -> None:
        self.sent: list[tuple[str, ...]] = []

    def send(self, rids: tuple[str, ...]) -> None:
        self.sent += [rids] if rids else []


MANAGER = SimpleNamespace(preferred_sampling_params=None)


@pytest.fixture
def ingress(monkeypatch) -> Ingress:
    from sglang.srt.managers.utils import is_health_check_generate_req

    monkeypatch.setattr("conserve_sgl.ingress.hooks.ArrivalSender", Sender)
    monkeypatch.setattr("conserve_sgl.ingress.hooks.SpareReceiver", lambda _endpoint: None)
    ingress = Ingress(ConserveConfig(), is_health_check_generate_req)
    args = SimpleNamespace(
        default_priority_value=None,
        schedule_low_priority_values_first=False,
        enable_metrics=False,
        tokenizer_worker_num=1,
    )
    manager = SimpleNamespace(server_args=args)
    ingress.after_init_ipc_channels(None, manager, SimpleNamespace(instance_id="x"))
    return ingress


@pytest.fixture
def offline():
    token = asked_class.set(ServiceClass.OFFLINE)
    yield
    asked_class.reset(token)


def generate(**fields: Any) -> Any:
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(**fields)
    request.normalize_batch_and_arguments()
    return request


def embed(**fields: Any) -> Any:
    from sglang.srt.managers.io_struct import EmbeddingReqInput

    request = EmbeddingReqInput(**fields)
    request.normalize_batch_and_arguments()
    return request


def rids(request: Any) -> tuple[str, ...]:
    return (request.rid,) if isinstance(request.rid, str) else tuple(request.rid)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        pytest.param(generate, {"text": "a"}, id="one prompt"),
        pytest.param(generate, {"input_ids": [1, 2]}, id="one prompt of tokens"),
        pytest.param(generate, {"text": ["a", "b"]}, id="several prompts"),
        pytest.param(embed, {"text": "a"}, id="one text to embed"),
        pytest.param(embed, {"text": ["a", "b"]}, id="several texts to embed"),
    ],
)
def test_a_request_is_announced_under_the_ids_that_it_will_have(ingress, make, fields):
    request = make(**fields)
    ingress.before_init_req_state(MANAGER, request)
    assert ingress._sender.sent == [rids(request)]
    assert request.priority == 0


@pytest.mark.parametrize("text", ["a", ["a", "b"]], ids=["one prompt", "several prompts"])
def test_several_samples_are_announced_one_by_one(ingress, text):
    request = generate(text=text, sampling_params={"n": 2})
    ingress.before_init_req_state(MANAGER, request)
    assert ingress._sender.sent == []
    sample = request[0]
    sample.regenerate_rid()
    ingress.before_init_req_state(MANAGER, sample)
    assert ingress._sender.sent == [(sample.rid,)]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("make", [generate, embed])
def test_every_part_of_an_offline_request_is_offline(ingress, make):
    request = make(text=["a", "b"])
    ingress.before_init_req_state(MANAGER, request)
    assert [request[i].priority for i in range(2)] == [-1, -1]
    assert ingress._sender.sent == []


@pytest.mark.usefixtures("offline")
def test_a_sample_of_an_offline_request_stays_offline(ingress):
    request = generate(text="a", sampling_params={"n": 2})
    ingress.before_init_req_state(MANAGER, request)
    sample = request[0]
    # The samples are made in the task of the request, and also where no tag is at hand.
    asked_class.set(None)
    ingress.before_init_req_state(MANAGER, sample)
    assert sample.priority == -1


def test_sglang_s_own_probe_is_known_as_one(ingress):
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    ingress.before_init_req_state(MANAGER, generate(text="a", rid=f"{HEALTH_CHECK_RID_PREFIX}_1"))
    assert ingress._sender.sent == []


@pytest.mark.parametrize("low_values_first", [False, True])
def test_priority_scheduling_makes_a_request_without_priority_the_least_urgent(low_values_first):
    # Why every request, probes too, has to leave the tokenizer process with a priority.
    from sglang.srt.managers.scheduler import Scheduler

    scheduler = SimpleNamespace(
        enable_priority_scheduling=True, schedule_low_priority_values_first=low_values_first
    )
    req = SimpleNamespace(priority=None)
    assert Scheduler._set_or_validate_priority(scheduler, req)
    rule = PriorityRule(low_values_first=low_values_first)
    assert rule.class_of(req.priority) is ServiceClass.OFFLINE


def test_the_routes_that_are_bounded_are_there():
    from sglang.srt.entrypoints.http_server import app

    posted = {r.path for r in app.routes if "POST" in (getattr(r, "methods", None) or ())}
    assert posted >= _GENERATING


def test_no_route_of_sglang_s_begins_with_our_prefix():
    from sglang.srt.entrypoints.http_server import app

    paths = [getattr(route, "path", "") for route in app.routes]
    assert len(paths) > 50
    assert not [path for path in paths if path.startswith(OFFLINE_PREFIX)]
