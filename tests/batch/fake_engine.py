"""An application with SGLang's OpenAI routes and no engine behind them, and a server around it.

As a server of its own: `python fake_engine.py PORT CONFIG LOG`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from conserve_sgl.batch.server.batch_server import BatchServer
from conserve_sgl.client.clock import Clock
from conserve_sgl.config import BatchConfig, ConserveConfig

Fault = tuple[int, dict[str, str]] | str
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


class _KeyCheck:
    """As SGLang's: around all routes, and it leaves `receive` alone."""

    def __init__(self, app: Any, api_key: str | None) -> None:
        self.app = app
        self.api_key = api_key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization")
        if (
            scope["type"] != "http"
            or not self.api_key
            or given == f"Bearer {self.api_key}".encode()
        ):
            await self.app(scope, receive, send)
        else:
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)


class FakeEngine:
    """Answers every text in capitals, unless `script` has a fault for it.

    `always` is a fault for every request; the text `deadly` ends the process. While `gate` is not
    set no request is answered; one whose client has gone ends with 400, as SGLang's do. As a
    gateway it has `workers`.
    """

    def __init__(self, api_key: str | None = None) -> None:
        self.script: dict[str, list[Fault]] = {}
        self.always: Fault | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.answered: Counter[str] = Counter()
        self.order: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.deadly = ""
        self.workers: list[str] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.active = 0
        self.peak = 0
        self.gone = 0
        self.started = 0
        self.stopped = 0
        self.on_answer: Callable[[str], Any] = lambda _: None
        self.app = self._application(api_key)

    def _application(self, api_key: str | None) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI):
            self.started += 1
            self.loop = asyncio.get_running_loop()
            yield
            self.stopped += 1

        app = FastAPI(lifespan=lifespan)
        for path in PATHS:
            app.add_api_route(path, self._answer, methods=["POST"])
        app.add_api_route("/workers", self._workers)

        app.add_middleware(_KeyCheck, api_key=api_key)
        return app

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        text = _text(body)
        self.requests.append((request.url.path, dict(request.headers), body))
        self.order.append(text)
        if self.always is not None:
            return self._fault(self.always)
        if self.script.get(text):
            return self._fault(self.script[text].pop(0))
        if text == self.deadly:
            os._exit(1)
        self.events.append(("begins", text))
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            while not self.gate.is_set():
                await asyncio.sleep(0.002)
                if await request.is_disconnected():
                    self.gone += 1
                    return JSONResponse({"message": "disconnected"}, 400)
        finally:
            self.active -= 1
            self.events.append(("ends", text))
        self.answered[text] += 1
        self.on_answer(text)
        return JSONResponse(_completion(request.url.path, text))

    async def _workers(self) -> Any:
        return {"workers": [{"url": url, "is_healthy": True} for url in self.workers]}

    def _fault(self, fault: Fault) -> Response:
        if fault == "raise":
            raise RuntimeError("scripted")
        if fault == "abort":
            choice = {"index": 0, "text": "", "finish_reason": "abort"}
            return JSONResponse({"choices": [choice]})
        if isinstance(fault, str) and fault.startswith("{"):
            return Response(fault)
        if fault == "text":
            return Response("not JSON", 418)
        status, headers = fault
        return JSONResponse({"error": {"message": "scripted"}}, status, headers=headers)


def _text(body: dict[str, Any]) -> str:
    if "messages" in body:
        return body["messages"][-1]["content"]
    return str(body.get("prompt") or body.get("input"))


def _completion(path: str, text: str) -> dict[str, Any]:
    if path == "/v1/responses":
        usage = {"input_tokens": 2, "output_tokens": 1, "total_tokens": 3}
        return {"object": "response", "output_text": text.upper(), "usage": usage}
    if path == "/v1/embeddings":
        usage = {"prompt_tokens": 2, "total_tokens": 2}
        return {"object": "list", "data": [{"embedding": [0.5]}], "usage": usage}
    usage = {
        "prompt_tokens": 2,
        "completion_tokens": 1,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    message = {"role": "assistant", "content": text.upper()}
    choice = {"index": 0, "message": message, "text": text.upper(), "finish_reason": "stop"}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


class FakeClock(Clock):
    """Goes on only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            await asyncio.sleep(0.002)


class FakeServer:
    """uvicorn in a thread, with an engine that is not there and, with a `config`, batches that
    are."""

    def __init__(
        self,
        config: BatchConfig | None,
        *,
        api_key: str | None = None,
        clock: FakeClock | None = None,
        port: int = 0,
    ) -> None:
        self.engine = FakeEngine(api_key)
        self.clock = clock or FakeClock()
        self.draining = threading.Event()
        if config is not None:
            self.batches = BatchServer(
                self.engine.app,
                config,
                api_key=api_key,
                is_draining=self.draining.is_set,
                clock=self.clock,
            )
        uvicorn_config = uvicorn.Config(self.engine.app, port=port, log_level="warning")
        self._server = uvicorn.Server(uvicorn_config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        self.wait_until(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started

    @property
    def url(self) -> str:
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def wait_until(self, condition: Callable[[], Any], step_s: float = 0.5) -> Any:
        """What `condition` gives once it is true; the clock goes on meanwhile."""
        for _ in range(20_000):
            if value := condition():
                return value
            self.clock.now_s += step_s
            time.sleep(0.003)
        raise AssertionError("it did not come true")

    def hold(self, held: bool) -> None:
        self.engine.loop.call_soon_threadsafe(self.batches.hold, held)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def die(self) -> None:
        """End at once; what is in flight gets no answer."""
        self._server.force_exit = True
        self.stop()


def main(port: int, config: str, log: str) -> None:
    """A server of its own; the texts of requests go to the file `log` as they are answered."""
    engine = FakeEngine()
    engine.deadly = "end the server"
    BatchServer(engine.app, ConserveConfig.load(config).batch)
    with Path(log).open("a", buffering=1) as answered:
        engine.on_answer = lambda text: answered.write(f"{text}\n")
        uvicorn.run(engine.app, port=port, log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
