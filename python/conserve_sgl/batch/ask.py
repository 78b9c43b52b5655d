"""One line of a batch over servers: what is sent for it, and the result line that comes of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import msgspec

from conserve_sgl.batch.answers import fault_of
from conserve_sgl.batch.schema import ResultLine, failed_line, new_request_id, result_line
from conserve_sgl.batch.validate import RequestLine
from conserve_sgl.client.http import BadReply, Client, LineFailed, Sending
from conserve_sgl.client.retry import Attempts

__all__ = ["OFFLINE_PRIORITY", "ask", "failure"]

OFFLINE_PRIORITY = -1
_BEGINNING_BYTES = 256


async def ask(
    client: Client,
    request: RequestLine,
    *,
    priority: int | None = OFFLINE_PRIORITY,
    sending: Sending = nullcontext,
) -> ResultLine:
    """The line for the answer to `request`. Because gateways drop headers its body says
    `service_tier` and `priority`, unless that is None.

    Raises:
        LineFailed, Stopped, JobError: as `Client.post`.
    """
    body = msgspec.json.decode(request.body) | {"service_tier": "flex"}
    if priority is not None:
        body["priority"] = priority
    near = client.home(_beginning(body))
    answer, _ = await client.post(request.url, body, _whole, Attempts(), near, sending)
    return result_line(request.custom_id, 200, answer, new_request_id())


def failure(custom_id: str, failed: LineFailed) -> ResultLine:
    """The line for a request that has failed."""
    if failed.status is None or failed.body is None:
        return failed_line(custom_id, "request_failed", str(failed))
    return result_line(custom_id, failed.status, failed.body, new_request_id())


def _beginning(body: dict[str, Any]) -> bytes:
    """How the prompt begins: lines that begin alike should find each other's KV."""
    prompt = next((body[key] for key in ("messages", "prompt", "input") if key in body), "")
    if not isinstance(prompt, str | list):
        return b""  # the server says what is wrong with it
    return msgspec.json.encode(prompt[:_BEGINNING_BYTES])[:_BEGINNING_BYTES]


def _whole(raw: bytes) -> bytes:
    if fault := fault_of(raw):
        raise BadReply(fault)
    return raw
