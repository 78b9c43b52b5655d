"""The workers behind a gateway, from the gateway itself.

A batch that is sent through a gateway loses its headers, fills the counters that the gateway
balances online requests by, and what is refused counts as a fault of a worker there. So a batch
asks it for its workers, and goes straight to them.
"""

from __future__ import annotations

import aiohttp
import msgspec

from conserve_sgl.errors import JobError

__all__ = ["healthy_workers"]

_TIMEOUT = aiohttp.ClientTimeout(total=30.0)


class _Worker(msgspec.Struct):
    url: str
    is_healthy: bool


class _Workers(msgspec.Struct):
    workers: list[_Worker]


async def healthy_workers(session: aiohttp.ClientSession, gateway: str) -> list[str]:
    """The base URLs of the HTTP workers of SGLang's gateway (`GET /workers`) that are well.

    Raises:
        JobError: it does not answer so, or has none.
    """
    url = gateway.rstrip("/") + "/workers"
    try:
        async with session.get(url, timeout=_TIMEOUT) as response:
            status, raw = response.status, await response.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        raise JobError(f"{url}: {str(e) or type(e).__name__}") from e
    if status != 200:
        raise JobError(f"{url}: {status}: this is no gateway of SGLang, or wants another API key")
    try:
        workers = msgspec.json.decode(raw, type=_Workers).workers
    except msgspec.MsgspecError as e:
        raise JobError(f"{url}: this is no gateway of SGLang: {e}") from e
    urls = [w.url for w in workers if w.is_healthy and w.url.startswith(("http://", "https://"))]
    if not urls:
        raise JobError(f"{url}: none of its {len(workers)} workers is well and speaks HTTP")
    return urls
