"""A server that has the real page and its rules, and numbers that are made up."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response

from conserve_sgl.bench.systems.server import free_port
from conserve_sgl.ingress.middleware import ServiceClassMiddleware
from conserve_sgl.ingress.page import StatusPage
from conserve_sgl.status.record import (
    BatchLine,
    Events,
    HostKv,
    Job,
    Kv,
    Latency,
    Offline,
    Online,
    Server,
    Settings,
    Snapshot,
    Step,
    StepModel,
    Why,
)
from support.server import until

STEP_S = 0.02
KEPT_S = 120.0
NASTY = "<img src=x onerror=alert(1)>"
"""A name that a client may give its job."""


class MadeUpServer:
    """What it tells, and what it was told.

    Attributes:
        settings, batches: as they hold; changed over HTTP.
        changes: the bodies of all changes.
        takes: whether it takes changes.
        answers: whether it tells anything; else 500.
        pid: changes when the server starts again.
    """

    def __init__(self) -> None:
        self.started_s = time.time() - 86_400
        self.settings = Settings(
            ttft="500ms",
            tpot="25ms",
            longest_gap=None,
            yield_ms=5.0,
            offline="run",
            batches="run",
            min_share=0.0,
        )
        self.batches = {"batch_0a1b2c": "in_progress"}
        self.changes: list[dict[str, Any]] = []
        self.takes = self.answers = True
        self.pid = 4242

    def change(self, numbers: Mapping[str, float]) -> bool:
        self.changes.append(dict(numbers))
        if not self.takes:
            return False
        new: dict[str, Any] = {}
        for name, number in numbers.items():
            key, _, unit = name.removeprefix("conserve_").rpartition("_")
            if name == "conserve_offline":
                new["offline"] = "run" if number else "pause"
            elif name == "conserve_batches":
                new["batches"] = "run" if number else "hold"
            elif name == "conserve_yield_ms":
                new["yield_ms"] = float(number)
            else:
                new[key] = f"{number:g}{unit}"
        self.settings = msgspec.structs.replace(self.settings, **new)
        return True

    def snapshot(self, since: int | None, latest: int) -> Snapshot:
        now_s = time.time()
        next_step = int((now_s - self.started_s) / STEP_S)
        first = next_step - latest if since is None else since
        first = max(first, next_step - int(KEPT_S / STEP_S))
        steps = tuple(self._step(seq) for seq in range(first, next_step))
        paused = self.settings.offline == "pause"
        shown = _snapshot(now_s, self.started_s, self.settings, self.batches, paused)
        server = msgspec.structs.replace(shown.server, pid=self.pid)
        return msgspec.structs.replace(shown, server=server, next_step=next_step, steps=steps)

    def _step(self, seq: int) -> Step:
        start_s = self.started_s + seq * STEP_S
        second = seq // 50 % 10
        prompt = seq % 17 == 0
        sliced = second == 7
        idle = second == 3 and seq % 50 < 25
        return Step(
            seq=seq,
            start_s=start_s,
            seconds=0.001 if idle else STEP_S - 0.001,
            idle_s=STEP_S if idle else 0.0,
            online_prompt_tokens=380 if prompt and not idle else 0,
            online_rows=0 if prompt or sliced or idle else 8 + second,
            offline_prompt_tokens=420 if sliced else 512 * (seq % 2 == 0 and not (prompt or idle)),
            offline_rows=0 if prompt or sliced or idle else 24 + 3 * (seq // 50 % 7),
            offline_parked=8,
            sliced=sliced,
            bound="slo.tpot",
            arrivals=int(seq % 17 == 16),
            preemptions=int(seq % 331 == 0),
            yields=int(sliced and seq % 50 == 49),
        )


def _snapshot(
    now_s: float,
    started_s: float,
    settings: Settings,
    batches: Mapping[str, str],
    paused: bool,
) -> Snapshot:
    sentence = (
        "Offline work is paused until `conserve tune --offline run`."
        if paused
        else "The 12 online rows leave no more time within slo.tpot (25ms); a larger one makes "
        "room. Of offline requests 40 run, 8 sit out, 144 wait."
    )
    held = {"paused": 12.0} if paused else {"slo.tpot": 9.1, "online prompts": 2.2, "slo.ttft": 0.6}
    age_s = int(now_s - started_s)
    return Snapshot(
        at_s=now_s,
        server=Server(
            model="meta-llama/Llama-3.1-8B-Instruct",
            conserve="0.1.0",
            sglang="0.5.23",
            host="gpu-7",
            pid=4242,
            started_at_s=started_s,
            rows=256,
            offline_rows=224,
            chunk_tokens=8192,
        ),
        settings=settings,
        why=Why(bound="paused" if paused else "slo.tpot", text=sentence, seconds=held),
        online=Online(
            rows=12,
            waiting=1,
            arriving=0,
            arrivals=18_234,
            window_s=300.0,
            ttft=Latency(objective_ms=500.0, p50_ms=54.2, p99_ms=158.1, samples=412, within=1.0),
            tpot=Latency(objective_ms=25.0, p50_ms=21.3, p99_ms=23.0, samples=398, within=1.0),
            itl=Latency(objective_ms=50.0, p50_ms=20.9, p99_ms=52.6, samples=81_234, within=0.9871),
            margins={"ttft": 1.0, "tpot": 0.85},
        ),
        offline=Offline(
            rows=0 if paused else 40,
            parked=0 if paused else 8,
            waiting=240 if paused else 144,
            waiting_tokens=210_344,
            oldest_wait_s=1834.2,
            at_risk=3,
            starved_s=0.0,
            tokens_per_s=0.0 if paused else 14_366.0,
            alone_tokens_per_s=20_512.0,
            tokens={
                "computed": 10_379 * age_s,
                "cached": 52_000,
                "output": int(3_987 * (now_s - started_s) + 9_000 * math.sin(now_s / 6)),
            },
            accepted=9321,
            refused=12,
            finished=9129,
            aborted=0,
            deadline_missed=1,
        ),
        jobs=(
            Job(
                name="batch_0a1b2c",
                waiting=100,
                running=40,
                finished=5200,
                waiting_tokens=150_000,
                deadline_at_s=now_s + 7200,
                done_at_s=now_s + 1410,
            ),
            Job(
                name="mmlu-nightly",
                waiting=44,
                running=8,
                finished=812,
                waiting_tokens=60_344,
                deadline_at_s=now_s + 600,
                done_at_s=now_s + 1300,
            ),
            Job(
                name=NASTY,
                waiting=1,
                running=0,
                finished=0,
                waiting_tokens=10,
                deadline_at_s=None,
                done_at_s=None,
            ),
        ),
        kv=Kv(
            total=480_000,
            online=31_000,
            offline=210_000,
            checkpointed=120_000,
            cached=180_000,
            free=59_000,
            reserved=40_000,
            host=HostKv(total=1_000_000, used=420_000, pinned=60_000),
        ),
        events=Events(
            preemptions=211 + age_s // 7,
            rows_parked=5120 + age_s,
            chunks_parked=31,
            yields=77 + age_s // 10,
            checkpointed_tokens=1_200_000,
            restored_tokens=180_000,
            recomputed_tokens=9100,
            host_full=0,
        ),
        model=StepModel(bias=0.02, is_biased=False),
        batches=tuple(
            BatchLine(
                id=name,
                status=status,
                total=10_000,
                completed=5198,
                failed=2,
                created_at_s=now_s - 3600,
                expires_at_s=now_s + 82_800,
            )
            for name, status in batches.items()
        ),
        has_steps=True,
    )


def _sglang_auth() -> ModuleType:
    """SGLang's rules of keys; by their file, since SGLang itself takes a long time to import."""
    sglang = find_spec("sglang")
    assert sglang is not None, "scripts/setup.sh installs it"
    file = Path(sglang.origin).parent / "srt" / "utils" / "auth.py"
    spec = spec_from_file_location("sglang_auth", file)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def application(
    server: MadeUpServer, *, api_key: str | None, admin_api_key: str | None
) -> ServiceClassMiddleware:
    """The layers of a real server, SGLang's key rules among them, around made-up numbers."""
    app = FastAPI()

    @app.get("/conserve/status")
    async def status(request: Request) -> Response:
        if not server.answers:
            return Response(status_code=500)
        query = request.query_params
        since = int(query["since"]) if "since" in query else None
        snapshot = server.snapshot(since, int(query.get("steps", 0)))
        return Response(msgspec.json.encode(snapshot), media_type="application/json")

    async def set_internal_state(request: Request) -> list[bool]:
        return [server.change((await request.json())["server_args"])]

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> dict[str, str]:
        server.batches[batch_id] = "cancelling"
        return {"id": batch_id, "status": "cancelling"}

    if api_key or admin_api_key:
        auth = _sglang_auth()
        set_internal_state = auth.auth_level(auth.AuthLevel.ADMIN_OPTIONAL)(set_internal_state)
        auth.add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    app.post("/set_internal_state")(set_internal_state)
    return ServiceClassMiddleware(StatusPage(app), max_offline=8, retry_after_s=1)


@contextmanager
def serving_made_up(
    *, api_key: str | None = None, admin_api_key: str | None = None
) -> Iterator[tuple[MadeUpServer, str]]:
    """The server and its base URL, on a port of its own."""
    made_up, port = MadeUpServer(), free_port()
    app = application(made_up, api_key=api_key, admin_api_key=admin_api_key)
    config = uvicorn.Config(app, port=port, log_level="warning", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield made_up, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
