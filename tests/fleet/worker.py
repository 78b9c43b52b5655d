"""Workers of a fleet without an engine: SGLang's routes behind conserve's own HTTP layer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from conserve_sgl.ingress.in_hand import InHand
from conserve_sgl.ingress.middleware import ServiceClassMiddleware, asked_class
from conserve_sgl.ingress.spare import SpareNow, SpareRoom
from conserve_sgl.policy import ServiceClass

AHEAD = 4


class Worker:
    """A server whose engine only waits: offline requests for a row, each for `row_s` seconds.

    Args:
        rows: offline requests that run at a time.
        row_s: how long each of them takes.
        take_spare_only: as the configuration `offline.take: spare`.
        conserve: whether it has conserve's HTTP layer at all.
        host, port: to listen on; 0: any port.
    """

    def __init__(
        self,
        *,
        rows: int = 4,
        row_s: float = 0.02,
        take_spare_only: bool = False,
        conserve: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.host = host
        self.row_s = row_s
        self.rows = rows
        self.offline: Counter[str] = Counter()
        self.online: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.peak = 0
        self.refused = 0
        self._in_hand = 0
        self._slots = asyncio.Semaphore(rows)
        in_hand = InHand()
        room = SpareRoom(self, in_hand)
        application = self._application()
        if conserve:
            build_stack = application.build_middleware_stack
            application.build_middleware_stack = lambda: ServiceClassMiddleware(
                build_stack(),
                max_offline=4096,
                retry_after_s=1,
                on_refusal=self._count_refusal,
                in_hand=in_hand,
                room=lambda: room,
                take_spare_only=take_spare_only,
            )
        config = uvicorn.Config(application, host=host, port=port, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.002)

    @property
    def port(self) -> int:
        return self._server.servers[0].sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def stop(self) -> None:
        """End at once; what is in flight gets no answer."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def latest(self) -> SpareNow:
        """What the engine would take now, always up to date."""
        return SpareNow(max(self.rows + AHEAD - self._in_hand, 0), time.monotonic())

    def _count_refusal(self) -> None:
        self.refused += 1

    def _application(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        models = {"object": "list", "data": [{"id": "model", "object": "model"}]}
        info = {"model_path": "model", "served_model_name": "model", "tp_size": 1, "dp_size": 1}
        for path, answer in {
            "/health": {},
            "/v1/models": models,
            "/model_info": info,
            "/get_model_info": info,
            "/server_info": info,
            "/get_server_info": info,
        }.items():
            app.add_api_route(path, lambda answer=answer: JSONResponse(answer), methods=["GET"])
        return app

    async def _chat(self, request: Request) -> JSONResponse:
        body = await request.json()
        text = body["messages"][-1]["content"]
        if asked_class.get() is ServiceClass.OFFLINE:
            async with self._row():
                await asyncio.sleep(self.row_s)
            self.offline[text] += 1
            self.headers.append(dict(request.headers))
        else:
            self.online[text] += 1
        message = {"role": "assistant", "content": text.upper()}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
        return JSONResponse(
            {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    @asynccontextmanager
    async def _row(self):
        self._in_hand += 1
        self.peak = max(self.peak, self._in_hand)
        try:
            async with self._slots:
                yield
        finally:
            self._in_hand -= 1
