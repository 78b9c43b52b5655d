"""Questions to the control plane of a server: one try each, and its answer or why there is none."""

from __future__ import annotations

from typing import Any

import aiohttp

from conserve_sgl.errors import ServerError

__all__ = ["RefusedError", "ask"]


class RefusedError(ServerError):
    """A server answered, and not with 200; `status` is what."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def ask(
    session: aiohttp.ClientSession, method: str, url: str, key: str | None, **kwargs: Any
) -> bytes:
    """The body of the answer.

    Args:
        session: with the timeout.
        method, url: of the question.
        key: bearer token, or None.
        kwargs: as for `session.request`.

    Raises:
        RefusedError: the answer is not a 200.
        ServerError: there is none.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # A redirect would turn a change into a question, and drop the key.
    kwargs |= {"headers": headers, "allow_redirects": False}
    try:
        async with session.request(method, url, **kwargs) as response:
            if response.status != 200:
                raise RefusedError(response.status, _refusal(url, response))
            return await response.read()
    except (aiohttp.ClientError, TimeoutError, ValueError) as e:
        raise ServerError(f"{url}: {str(e) or type(e).__name__}") from e


def _refusal(url: str, response: aiohttp.ClientResponse) -> str:
    is_closed = response.status in (401, 403)
    hint = "; give --api-key or --admin-api-key" if is_closed else ""
    if moved := response.headers.get("location"):
        hint = f"; it points to {moved}"
    return f"{url}: {response.status} {response.reason}{hint}"
