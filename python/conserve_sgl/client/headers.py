"""What a request says of itself in its headers: offline work, of which job, and until when.

docs/service-class.md is the reference. Names are in lower case, as ASGI wants them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

__all__ = [
    "OFFLINE_HEADERS",
    "Spare",
    "deadline_header",
    "key_header",
    "offline_headers",
    "spare_of",
]

OFFLINE_HEADERS = {"x-sgl-conserve-class": "offline"}
_JOB = "x-sgl-conserve-job"
_DEADLINE = "x-sgl-conserve-deadline-s"
_SPARE = "x-sgl-conserve-spare"
_SPARE_AFTER = "x-sgl-conserve-spare-after-ms"
_JOB_CHARACTERS = 128


def offline_headers(job: str) -> dict[str, str]:
    """Offline work of `job`, a name that may be any text: what a header cannot hold is cut."""
    # A file's name may hold anything but a slash; a header and the server take less.
    name = "".join(c for c in job if c.isprintable())[:_JOB_CHARACTERS].strip()
    return OFFLINE_HEADERS | ({_JOB: name} if name else {})


def deadline_header(left_s: float) -> dict[str, str]:
    """The job should be done in `left_s` seconds; below 0, it should have been."""
    return {_DEADLINE: f"{left_s:.3f}"}


def key_header(api_key: str | None) -> dict[str, str]:
    """The server's key, where it wants one."""
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


class Spare(msgspec.Struct, frozen=True):
    """What a server says in its reply that it would take.

    Args:
        requests: how many more offline requests.
        after_s: how long it had had this request when it said so; None where it does not tell.
    """

    requests: int
    after_s: float | None


def spare_of(headers: Mapping[str, str]) -> Spare | None:
    """What the reply with these headers says of the kind; None where that is nothing."""
    requests, after_ms = _number(headers.get(_SPARE)), _number(headers.get(_SPARE_AFTER))
    if requests is None:
        return None
    return Spare(requests, None if after_ms is None else after_ms / 1000)


def _number(said: str | None) -> int | None:
    return int(said) if said and said.isascii() and said.isdigit() and len(said) < 10 else None
