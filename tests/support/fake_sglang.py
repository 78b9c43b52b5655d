"""A stand-in for an SGLang server, for what talks to one from outside."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

# What a script may answer instead of a completion: a status with headers, or a cut connection.
Fault = tuple[int, dict[str, str]] | str


class FakeSGLang:
    """Answers `/generate`, `/v1/chat/completions`, `/tokenize` and `/model_info` like SGLang.

    Runs its own event loop in a thread, so that runs under test may own theirs. A token is a
    character, except for the pairs in `merges`, which are one token, and those in `dropped`, which
    are none. The answer to a prompt is its last word in capitals; the logprob of a token is minus
    its number of occurrences in the whole text over ten, hence deterministic. The answer to token
    ids is their number.

    Attributes:
        script: prompt -> faults to give before the answer, in order; mutated as they are used.
        hold: an answer waits until this is set.
        peak: the most completions that were under way at one time.
        prompts: how often each prompt was answered with a completion.
        requests: (path, headers, body) of everything that came in, in order.
    """

    def __init__(self) -> None:
        self.model = "tiny"
        self.api_key: str | None = None
        self.merges: tuple[str, ...] = ()
        self.dropped = ""
        self.tokenizer: str | None = None
        self.max_req_input_len: int | None = None
        self.models_status = 404
        self.max_model_len: Any = None
        self.script: dict[str, list[Fault]] = {}
        self.always: Fault | None = None
        self.active = self.peak = 0
        self.hold = threading.Event()
        self.hold.set()
        self.prompts: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.changed = threading.Condition()
        self._ids: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.port = self._call(self._start(0))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Refuse connections from now on, and drop those that are open."""
        self._call(self._runner.cleanup())

    def restart(self) -> None:
        """Listen again, on the same port."""
        self._call(self._start(self.port))

    def close(self) -> None:
        self.hold.set()
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait_until(self, condition: Callable[[FakeSGLang], bool]) -> None:
        """Block until `condition` holds; it is looked at after each request and answer."""
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), timeout=60)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=60)

    async def _start(self, port: int) -> int:
        app = web.Application()
        app.router.add_post("/generate", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._server_info)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        return self._runner.addresses[0][1]

    async def _model_info(self, request: web.Request) -> web.Response:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        info = {"model_path": self.model, "tokenizer_path": self.tokenizer}
        return web.json_response({key: value for key, value in info.items() if value is not None})

    async def _models(self, _: web.Request) -> web.Response:
        if self.models_status != 200:
            return web.Response(status=self.models_status)
        return web.json_response({"data": [{"id": "tiny", "max_model_len": self.max_model_len}]})

    async def _server_info(self, _: web.Request) -> web.Response:
        if self.max_req_input_len is None:
            raise web.HTTPNotFound
        return web.json_response({"max_req_input_len": self.max_req_input_len})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._note(request, body)
        return web.json_response({"tokens": [self.tokens(text) for text in body["prompt"]]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self._note(request, body)
        prompt = body.get("text") or json.dumps(body.get("messages") or body.get("input_ids"))
        fault = self.always or next(iter(self.script.get(prompt, [])), None)
        if fault is not None:
            if prompt in self.script:
                del self.script[prompt][0]
            return self._fault(request, fault)
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            while not self.hold.is_set():
                await asyncio.sleep(0.005)
        finally:
            self.active -= 1
        with self.changed:
            self.prompts[prompt] += 1
            self.changed.notify_all()
        return web.json_response(self._completion(body))

    def _fault(self, request: web.Request, fault: Fault) -> web.Response:
        if fault == "drop":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "abort":
            reason = {"type": "abort", "message": "Aborted", "status_code": None}
            meta = {"finish_reason": reason, "prompt_tokens": 1, "completion_tokens": 0}
            return web.json_response({"text": "", "meta_info": meta})
        if fault == "nonsense":
            return web.Response(text="<html>hello</html>")
        status, headers = fault
        return web.json_response({"error": {"message": "scripted"}}, status=status, headers=headers)

    def _completion(self, body: dict[str, Any]) -> Any:
        if body.get("return_logprob"):
            start, ids = body["logprob_start_len"], body["input_ids"]
            if isinstance(ids[0], int):
                return self._scored(ids, start)
            return [self._scored(each, start) for each in ids]
        if "input_ids" in body:
            return {"text": f"{len(body['input_ids'])}", "meta_info": self._meta(1, 2)}
        text = body.get("text") or body["messages"][-1]["content"]
        output = text.split()[-1].upper()
        if "messages" in body:
            message = {"role": "assistant", "content": output}
            usage = {"prompt_tokens": len(text), "completion_tokens": len(output)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return {"choices": [choice], "usage": usage}
        return {"text": output, "meta_info": self._meta(len(text), len(output))}

    def _meta(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        return {
            "id": "r",
            "finish_reason": {"type": "stop", "matched": 0},
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cached_tokens": 1,
        }

    def _scored(self, ids: list[int], start: int) -> dict[str, Any]:
        logprobs = [[-ids.count(i) / 10, i, None] for i in ids[start:]]
        logprobs[0][0] = None
        # The likeliest token is the one that is there, unless it is there more than once.
        top = [[[0.0, i if ids.count(i) == 1 else -1, None]] for i in ids[start:]]
        found = {"input_token_logprobs": logprobs, "input_top_logprobs": [None, *top[1:]]}
        return {"text": "", "meta_info": self._meta(len(ids), 0) | found}

    def tokens(self, text: str) -> list[int]:
        pieces = []
        text = "".join(character for character in text if character not in self.dropped)
        while text:
            piece = next((m for m in self.merges if text.startswith(m)), text[0])
            pieces.append(piece)
            text = text[len(piece) :]
        return [self._ids.setdefault(piece, len(self._ids)) for piece in pieces]

    def _note(self, request: web.Request, body: Any) -> None:
        with self.changed:
            self.requests.append((request.path, dict(request.headers), body))
            self.changed.notify_all()


@pytest.fixture
def server() -> Iterator[FakeSGLang]:
    fake = FakeSGLang()
    yield fake
    fake.close()


@pytest.fixture
def second_server() -> Iterator[FakeSGLang]:
    fake = FakeSGLang()
    yield fake
    fake.close()
