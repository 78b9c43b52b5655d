"""`GET /conserve/status` of a server: its record at this moment, with the steps that are asked for.

    ?since=SEQ   the steps from that one on, as far back as they are kept
    ?steps=N     the N latest at most

Without either it is the record alone. Who may ask is decided around the application, by the
server's own API key. The answer comes from the scheduler, which is asked between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from conserve_sgl.status.ask import Answer, Ask
from conserve_sgl.status.record import BatchLine, Snapshot
from conserve_sgl.status.steps import steps_of

__all__ = ["STATUS_PATH", "add_status_route", "ask_of_query"]

STATUS_PATH = "/conserve/status"


def add_status_route(
    app: FastAPI,
    ask_scheduler: Callable[[str], Awaitable[Mapping[str, Any]]],
    open_batches: Callable[[], Awaitable[Sequence[BatchLine]]],
) -> None:
    """Put the route on `app`.

    Args:
        app: a FastAPI application.
        ask_scheduler: asks the scheduler for its internal state, with an id.
        open_batches: the batches of this process that have not ended.
    """

    async def conserve_status(request: Request) -> Response:
        """What the server does now, and what bounds offline work."""
        try:
            ask = ask_of_query(request.query_params)
        except ValueError as e:
            return _json({"error": {"message": str(e), "type": "invalid_request_error"}}, 400)
        # Not to be given up half-way: SGLang would take the answer for that of the next question.
        state = await asyncio.shield(asyncio.ensure_future(ask_scheduler(ask.to_rid())))
        snapshot = snapshot_of(msgspec.convert(state, Answer))
        return _json(msgspec.structs.replace(snapshot, batches=tuple(await open_batches())))

    app.add_api_route(STATUS_PATH, conserve_status, methods=["GET"], tags=["conserve"])


def ask_of_query(query: Mapping[str, str]) -> Ask:
    """What a query asks for.

    Raises:
        ValueError: a number is none, or below 0.
    """
    since, most = _number(query, "since"), _number(query, "steps")
    return Ask(since=since, most=0 if since is None and most is None else most)


def snapshot_of(answer: Answer) -> Snapshot:
    """The whole record."""
    steps = steps_of(answer.first, answer.steps, epoch_s=answer.epoch_s)
    snapshot = msgspec.json.decode(answer.snapshot, type=Snapshot)
    return msgspec.structs.replace(snapshot, steps=tuple(steps))


def _number(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise ValueError(f"{name} is a number from 0 on, not {text[:32]!r}")
    return int(text)


def _json(body: Any, status: int = 200) -> Response:
    text, no_store = msgspec.json.encode(body), {"cache-control": "no-store"}
    return Response(text, status, headers=no_store, media_type="application/json")
