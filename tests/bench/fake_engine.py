"""Speaks as much of SGLang's HTTP as the benchmark needs, with no engine behind it.

In a test's own process: `FakeEngine().app()`. As a server: `python fake_engine.py PORT`, with a
number behind it one that dies at that request.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from aiohttp import web

CACHED_TOKENS = 3
ANSWER_S = 0.02
"""Of the program: a backlog that is answered at once keeps it and its client busy for nothing."""


class FakeEngine:
    """Answers `/generate` in chunks of `chunk_tokens` tokens, in the way that `faults` say.

    `faults` is taken in turn, one for each request: None is a good answer. While `gate` is clear
    no request is answered; otherwise an answer begins after `answer_s`.
    """

    def __init__(
        self,
        *,
        faults: tuple[str | None, ...] = (None,),
        chunk_tokens: int = 1,
        answer_s: float = 0.0,
    ) -> None:
        self.faults = faults
        self.chunk_tokens = chunk_tokens
        self.answer_s = answer_s
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.in_hand = self.most_in_hand = 0
        self.started_s = time.monotonic()
        self.told: dict[str, float] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/server_info", self.server_info)
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/flush_cache", self.flush_cache)
        app.router.add_post("/set_internal_state", self.set_internal_state)
        return app

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def metrics(self, _: web.Request) -> web.Response:
        """Idle for half of the time that it is up."""
        idle_s = 0.5 * (time.monotonic() - self.started_s)
        text = f'sglang:scheduler_idle_seconds_total{{model_name="a {{b}}"}} {idle_s}\n'
        return web.Response(text=f"# HELP x y\n{text}sglang:num_retracted_requests_total 3.0\n")

    async def server_info(self, _: web.Request) -> web.Response:
        state = {
            "offline_preempted": len(self.bodies),
            "arrivals_received": 4,
            "arrival_ms": {"p50": 1.5, "p99": 2.5},
            "on": True,
        }
        state |= {"told": self.told} if self.told else {}
        return web.json_response({"internal_states": [{"conserve": state}]})

    async def flush_cache(self, _: web.Request) -> web.Response:
        print("caches emptied", flush=True)
        return web.Response()

    async def set_internal_state(self, request: web.Request) -> web.Response:
        self.told = (await request.json())["server_args"]
        return web.json_response([True])

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.in_hand += 1
        self.most_in_hand = max(self.most_in_hand, self.in_hand)
        try:
            return await self.answer(request)
        finally:
            self.in_hand -= 1

    async def answer(self, request: web.Request) -> web.StreamResponse:
        fault = self.faults[len(self.bodies) % len(self.faults)]
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        await self.gate.wait()
        if self.answer_s:
            await asyncio.sleep(self.answer_s)
        if fault == "busy":
            return web.json_response({"error": {"message": "come back later"}}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self._stream(response, body, fault)
        return response

    async def _stream(self, response: web.StreamResponse, body: dict, fault: str | None) -> None:
        total = body["sampling_params"]["max_new_tokens"]
        for done in range(self.chunk_tokens, total + 1, self.chunk_tokens):
            if done == total and fault == "drop":
                return
            if done == total and fault == "stall":
                self.gate.clear()
                await self.gate.wait()
            if done == total and fault == "error":
                await self._send(response, {"error": {"message": "out of luck", "code": 400}})
                continue
            reason = None if done < total else {"type": "abort" if fault == "abort" else "length"}
            await self._send(response, self._chunk(body, done, reason))
        await response.write(b"data: [DONE]\n\n")

    def _chunk(self, body: dict, done: int, reason: dict | None) -> dict:
        return {
            "text": "a" * done,
            "output_ids": list(range(done)),
            "meta_info": {
                "id": "x",
                "prompt_tokens": len(body.get("input_ids", ()) or body["text"].split()),
                "cached_tokens": CACHED_TOKENS,
                "completion_tokens": done,
                "finish_reason": reason,
            },
        }

    async def _send(self, response: web.StreamResponse, data: dict) -> None:
        await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")


class Mortal(FakeEngine):
    """Dies at its `last` request."""

    def __init__(self, last: int) -> None:
        super().__init__(answer_s=ANSWER_S)
        self.last = last

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if len(self.bodies) >= self.last:
            print("out of memory", flush=True)
            os._exit(3)
        return await super().answer(request)


async def app() -> web.Application:
    if log := os.environ.get("CONSERVE_STEP_LOG"):
        with open(log, "a") as file:
            file.write("a step\n")
    mortal = [int(word) for word in sys.argv[2:3] if word.isdigit()]
    return (Mortal(*mortal) if mortal else FakeEngine(answer_s=ANSWER_S)).app()


if __name__ == "__main__":
    web.run_app(app(), host="127.0.0.1", port=int(sys.argv[1]))
