"""What the hooks do to a request object, told by fakes of SGLang's objects."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from conserve_sgl.config import ConserveConfig, OfflineConfig, StatusConfig
from conserve_sgl.ingress.arrival import arrival_endpoint
from conserve_sgl.ingress.classify import AskedJob
from conserve_sgl.ingress.hooks import Ingress
from conserve_sgl.ingress.middleware import asked_class, asked_job
from conserve_sgl.policy import JobTag, ServiceClass

ONLINE, OFFLINE = ServiceClass.ONLINE, ServiceClass.OFFLINE


@dataclass
class Generate:
    """A GenerateReqInput as `_init_req_state` gets it: normalized, so it has its ids."""

    rid: str | list[str]
    priority: int | None = None
    parallel_sample_num: int = 1
    sampling_params: Any = field(default_factory=dict)


@dataclass
class Embedding:
    """An EmbeddingReqInput, which knows no samples."""

    rid: str | list[str]
    priority: int | None = None
    sampling_params: Any = field(default_factory=dict)


@dataclass
class FakeSender:
    """Stands where the arrival channel's sender does."""

    endpoint: str
    sent: list[tuple[str, ...]] = field(default_factory=list)

    def send(self, rids: tuple[str, ...]) -> None:
        if rids:
            self.sent.append(rids)


class FakeReceiver:
    """Stands where the receiver of what the engine would take does: nothing was said yet."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def latest(self) -> None:
        return None


def is_health_check(request: Any) -> bool:
    """As SGLang's: it is made for a single request."""
    return request.rid.startswith("HEALTH_CHECK")


@contextmanager
def asking_for(service_class: ServiceClass | None):
    token = asked_class.set(service_class)
    try:
        yield
    finally:
        asked_class.reset(token)


@pytest.fixture
def senders(monkeypatch) -> list[FakeSender]:
    """Every sender that was made."""
    made: list[FakeSender] = []

    def make(endpoint: str) -> FakeSender:
        made.append(FakeSender(endpoint))
        return made[-1]

    monkeypatch.setattr("conserve_sgl.ingress.hooks.ArrivalSender", make)
    monkeypatch.setattr("conserve_sgl.ingress.hooks.SpareReceiver", FakeReceiver)
    return made


def started(*, default: int | None = None, low_values_first: bool = False) -> Ingress:
    """The hooks of a tokenizer process whose sockets are up."""
    ingress = Ingress(ConserveConfig(), is_health_check)
    args = SimpleNamespace(
        default_priority_value=default,
        schedule_low_priority_values_first=low_values_first,
        enable_metrics=False,
        tokenizer_worker_num=1,
    )
    manager = SimpleNamespace(server_args=args)
    ingress.after_init_ipc_channels(None, manager, SimpleNamespace(instance_id="engine-1"))
    return ingress


@pytest.mark.usefixtures("senders")
def test_refusals_are_counted_under_the_name_that_the_model_is_served_by(monkeypatch):
    """The flag of that name is None where the model's path is its name."""
    named: list[str] = []
    monkeypatch.setattr(
        "conserve_sgl.ingress.hooks.refusal_counter", lambda name: named.append(name)
    )
    args = SimpleNamespace(
        default_priority_value=None,
        schedule_low_priority_values_first=False,
        enable_metrics=True,
        tokenizer_worker_num=1,
        served_model_name=None,
    )
    manager = SimpleNamespace(server_args=args, served_model_name="models/m")
    ports = SimpleNamespace(instance_id="engine-1")
    Ingress(ConserveConfig(), is_health_check).after_init_ipc_channels(None, manager, ports)
    assert named == ["models/m"]


def through(ingress: Ingress, request: Any) -> Any:
    """`request` after the hook; SGLang calls it with the HTTP request, or without."""
    manager = SimpleNamespace(preferred_sampling_params=None)
    assert ingress.before_init_req_state(manager, request, None) is None
    return request


# ------------------------------------------------------------------ stamping


@pytest.mark.parametrize(
    ("asked", "priority", "stamped"),
    [
        pytest.param(None, None, 0, id="untagged without a priority is online"),
        pytest.param(None, 3, 3, id="an online priority is kept"),
        pytest.param(None, -5, -1, id="an offline priority becomes the canonical one"),
        pytest.param(OFFLINE, None, -1, id="a tag makes it offline"),
        pytest.param(OFFLINE, 3, -1, id="a tag beats an online priority"),
        pytest.param(ONLINE, -5, 0, id="a tag beats an offline priority"),
    ],
)
def test_stamps_the_priority(senders, asked, priority, stamped):
    ingress = started()
    with asking_for(asked):
        assert through(ingress, Generate("a", priority)).priority == stamped
    assert senders[0].sent == ([("a",)] if stamped >= 0 else [])


@pytest.mark.parametrize(
    ("server", "priority", "stamped"),
    [
        pytest.param({"default": 5}, None, 5, id="default 5: online"),
        pytest.param({"default": 5}, 2, 4, id="default 5: two is offline"),
        pytest.param({"low_values_first": True}, 9, 1, id="low first: nine is offline"),
        pytest.param({"low_values_first": True}, -9, -9, id="low first: minus nine is online"),
        pytest.param(
            {"default": 5, "low_values_first": True}, 9, 6, id="low first from 5: nine is offline"
        ),
    ],
)
@pytest.mark.usefixtures("senders")
def test_follows_the_server_s_flags(server, priority, stamped):
    assert through(started(**server), Generate("a", priority)).priority == stamped


@pytest.mark.usefixtures("senders")
def test_stamps_an_embedding():
    with asking_for(OFFLINE):
        assert through(started(), Embedding("a")).priority == -1


@pytest.mark.usefixtures("senders")
def test_stamps_a_request_with_several_prompts():
    with asking_for(OFFLINE):
        assert through(started(), Generate(["a", "b"])).priority == -1


def test_a_health_check_is_neither_offline_nor_announced(senders):
    ingress = started()
    with asking_for(OFFLINE):
        assert through(ingress, Generate("HEALTH_CHECK_1")).priority != -1
    assert senders[0].sent == []


@pytest.mark.usefixtures("senders")
def test_a_health_check_is_stamped_online():
    assert through(started(), Generate("HEALTH_CHECK_1")).priority == 0


def test_stamps_before_the_sockets_are_up():
    # An Engine in the caller's process may be asked from the first moment on.
    ingress = Ingress(ConserveConfig(), is_health_check)
    assert through(ingress, Generate("a", -5)).priority == -1


# -------------------------------------------------------------------- the job


def tag_of(params: Any) -> JobTag | None:
    return JobTag.take_out(params.get("custom_params"))[0]


@pytest.fixture
def named_job():
    token = asked_job.set(AskedJob("nightly", 60.0))
    yield
    asked_job.reset(token)


@pytest.mark.usefixtures("senders", "named_job")
def test_an_offline_request_carries_its_job_and_an_absolute_deadline():
    tag = tag_of(through(started(), Generate("a", -1)).sampling_params)
    assert tag == JobTag(received_s=tag.received_s, job="nightly", deadline_s=tag.received_s + 60.0)


@pytest.mark.usefixtures("senders")
@pytest.mark.parametrize("params", [{}, None, {"temperature": 0}])
def test_one_without_a_job_says_when_it_was_received(params):
    request = through(started(), Embedding("a", -1, params))
    tag = tag_of(request.sampling_params)
    assert tag == JobTag(received_s=tag.received_s)


@pytest.mark.usefixtures("senders", "named_job")
@pytest.mark.parametrize("params", [{}, {"custom_params": {"conserve": "mine"}}])
def test_an_online_request_is_left_alone(params):
    assert through(started(), Generate("a", 0, sampling_params=params)).sampling_params is params


@pytest.mark.usefixtures("senders", "named_job")
def test_every_prompt_of_a_request_carries_it_and_keeps_its_own_parameters():
    shared = {"temperature": 0}
    own = {"custom_params": {"thinking_budget": 3}}
    request = through(
        started(), Generate(["a", "b", "c"], -1, sampling_params=[shared, shared, own])
    )
    assert [tag_of(params).job for params in request.sampling_params] == ["nightly"] * 3
    assert request.sampling_params[2]["custom_params"]["thinking_budget"] == 3
    assert shared == {"temperature": 0}
    assert own == {"custom_params": {"thinking_budget": 3}}


@pytest.mark.usefixtures("senders")
def test_the_server_s_own_custom_params_stay():
    manager = SimpleNamespace(preferred_sampling_params={"custom_params": {"a": 1}})
    request = Generate("a", -1)
    started().before_init_req_state(manager, request, None)
    assert request.sampling_params["custom_params"]["a"] == 1


# ---------------------------------------------------------------- announcing


def test_the_channel_is_the_one_of_this_server(senders):
    started()
    assert [s.endpoint for s in senders] == [arrival_endpoint("engine-1")]
    assert arrival_endpoint("engine-1") != arrival_endpoint("engine-2")


@pytest.mark.parametrize(
    ("request_", "announced"),
    [
        pytest.param(Generate("a"), [("a",)], id="one prompt"),
        pytest.param(Generate(["a", "b"]), [("a", "b")], id="several prompts"),
        pytest.param(Embedding("a"), [("a",)], id="one text to embed"),
        pytest.param(Embedding(["a", "b"]), [("a", "b")], id="several to embed"),
        pytest.param(
            Generate(["a", "b"], parallel_sample_num=2),
            [],
            id="several samples get ids of their own later",
        ),
        pytest.param(Generate("a", parallel_sample_num=2), [("a",)], id="one of several samples"),
        pytest.param(Generate("a", priority=-1), [], id="offline work is not announced"),
    ],
)
def test_announces(senders, request_, announced):
    through(started(), request_)
    assert senders[0].sent == announced


# -------------------------------------------------------------- the HTTP layer


async def test_our_layer_is_the_outermost_and_set_up_from_the_configuration():
    paths: list[str] = []

    async def note(request: Request, call_next: Any) -> Any:
        paths.append(request.url.path)
        return await call_next(request)

    async def generate(_request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(asked_class.get()))

    app = Starlette(routes=[Route("/generate", generate, methods=["POST"])])
    app.add_middleware(BaseHTTPMiddleware, dispatch=note)
    config = ConserveConfig(offline=OfflineConfig(queue_requests=1, retry_after_s=3))
    Ingress(config, is_health_check).wrap(app)

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
        assert (await http.post("/offline/generate")).text == str(OFFLINE)
        app.middleware_stack.in_hand.begin()
        refused = await http.post("/offline/generate")
    assert paths == ["/generate"]
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")


@pytest.mark.parametrize(("enabled", "status"), [(True, 200), (False, 404)])
async def test_the_page_is_there_where_the_configuration_has_it(enabled, status):
    app = Starlette()
    config = ConserveConfig(status=StatusConfig(enabled=enabled))
    Ingress(config, is_health_check).wrap(app)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
        for path in ("/conserve", "/offline/conserve", "/conserve/page.js"):
            assert (await http.get(path)).status_code == status
