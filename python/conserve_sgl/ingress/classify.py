"""Reads the service class that a client asked for, and its job, from an HTTP request. Pure.

Several equivalent tags are read because none survives every client and every gateway
(docs/service-class.md has the table):

    path prefix     /offline/v1/chat/completions
    header          x-sgl-conserve-class: offline, or x-smg-priority: bulk
    body            "service_tier": "flex"
    body            "priority", read later by `PriorityRule`, where SGLang has parsed it

The job and the deadline of offline work, likewise:

    header          x-sgl-conserve-job and x-sgl-conserve-deadline-s
    body            "metadata": {"conserve_job": ..., "conserve_deadline_s": ...}
    header          x-gateway-inference-fairness-id and x-slo-ttft-ms, as llm-d's batch gateway
                    sets them
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import msgspec

from conserve_sgl.policy.job_tag import LONGEST_LEFT_S
from conserve_sgl.policy.service_class import ServiceClass

__all__ = [
    "OFFLINE_PREFIX",
    "AskedJob",
    "class_from_body",
    "class_from_headers",
    "job_from_body",
    "job_from_headers",
    "split_prefix",
]

OFFLINE_PREFIX = "/offline"

_CLASS_HEADER = b"x-sgl-conserve-class"
_GATEWAY_HEADER = b"x-smg-priority"
_JOB_HEADER = b"x-sgl-conserve-job"
_DEADLINE_HEADER = b"x-sgl-conserve-deadline-s"
_GATEWAY_JOB_HEADER = b"x-gateway-inference-fairness-id"
_GATEWAY_DEADLINE_HEADER = b"x-slo-ttft-ms"
_JOB_KEY = "conserve_job"
_DEADLINE_KEY = "conserve_deadline_s"
_JOB_CHARACTERS = 128
_SHOWN_CHARACTERS = 200
_TIERS = {
    "flex": ServiceClass.OFFLINE,
    "default": ServiceClass.ONLINE,
    "priority": ServiceClass.ONLINE,
}


class AskedJob(msgspec.Struct, frozen=True):
    """The job that a request says it belongs to; None is what it does not say.

    Args:
        job: its name.
        left_s: seconds from now to its deadline, at most LONGEST_LEFT_S; negative when that has
            passed, at least -LONGEST_LEFT_S.
    """

    job: str | None = None
    left_s: float | None = None

    def __or__(self, other: AskedJob) -> AskedJob:
        """This, and what `other` says where this says nothing."""
        return AskedJob(
            job=other.job if self.job is None else self.job,
            left_s=other.left_s if self.left_s is None else self.left_s,
        )


class _Tagged(msgspec.Struct):
    """The fields of a request body that matter here; the rest is skipped, not parsed."""

    service_tier: object = None
    metadata: object = None


_decoder = msgspec.json.Decoder(_Tagged)


def split_prefix(path: str) -> tuple[str, bool]:
    """`path` without the offline prefix, and whether it had it."""
    if path == OFFLINE_PREFIX or path.startswith(OFFLINE_PREFIX + "/"):
        return path[len(OFFLINE_PREFIX) :] or "/", True
    return path, False


def class_from_headers(headers: Iterable[tuple[bytes, bytes]]) -> ServiceClass | None:
    """The class that the headers (lower-case names, as ASGI gives them) ask for, or None.

    Raises:
        ValueError: `x-sgl-conserve-class` has a value that is no class; the text names it.
    """
    asked = None
    for name, value in headers:
        if name == _CLASS_HEADER:
            return _class_named(value.decode("latin-1").strip().lower())
        if name == _GATEWAY_HEADER and value.strip().lower() == b"bulk":
            asked = ServiceClass.OFFLINE
    return asked


def _class_named(name: str) -> ServiceClass:
    try:
        return ServiceClass(name)
    except ValueError:
        header = _CLASS_HEADER.decode()
        raise ValueError(f"{header}: must be online or offline, not {name!r}") from None


def class_from_body(body: bytes) -> ServiceClass | None:
    """The class that a JSON body's `service_tier` asks for, or None.

    A body that is no JSON object asks for nothing: refusing it is the route's business.
    """
    if b'"service_tier"' not in body:
        return None
    tier = _tagged(body).service_tier
    return _TIERS.get(tier) if isinstance(tier, str) else None


def _tagged(body: bytes) -> _Tagged:
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _leniently_tagged(body)


def _leniently_tagged(body: bytes) -> _Tagged:
    """As SGLang's routes read it: with NaN, half a surrogate pair and other things JSON is not."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return _Tagged()
    if not isinstance(fields, dict):
        return _Tagged()
    return _Tagged(fields.get("service_tier"), fields.get("metadata"))


def job_from_headers(headers: Iterable[tuple[bytes, bytes]]) -> AskedJob:
    """The job that the headers name, ours before a gateway's.

    Raises:
        ValueError: one of ours has a value that cannot be used; the text names it.
    """
    ours, gateways = AskedJob(), AskedJob()
    for name, value in headers:
        if name == _JOB_HEADER:
            ours |= AskedJob(job=_job(_JOB_HEADER.decode(), _text(value)))
        elif name == _DEADLINE_HEADER:
            ours |= AskedJob(left_s=_seconds(_DEADLINE_HEADER.decode(), _text(value)))
        elif name == _GATEWAY_JOB_HEADER:
            gateways |= AskedJob(job=_gateway_job(_text(value)))
        elif name == _GATEWAY_DEADLINE_HEADER:
            gateways |= AskedJob(left_s=_gateway_seconds(_text(value)))
    return ours | gateways


def job_from_body(body: bytes) -> AskedJob:
    """The job that the `metadata` of a JSON body names.

    Raises:
        ValueError: with a value that cannot be used; the text names it.
    """
    if b'"conserve_' not in body:
        return AskedJob()
    metadata = _tagged(body).metadata
    if not isinstance(metadata, dict):
        return AskedJob()
    job, left_s = metadata.get(_JOB_KEY), metadata.get(_DEADLINE_KEY)
    return AskedJob(
        job=None if job is None else _job(f"metadata.{_JOB_KEY}", job),
        left_s=None if left_s is None else _seconds(f"metadata.{_DEADLINE_KEY}", left_s),
    )


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _job(where: str, name: object) -> str:
    text = name.strip() if isinstance(name, str) else ""
    if not text or len(text) > _JOB_CHARACTERS or not text.isprintable():
        raise ValueError(
            f"{where}: must be a name of 1 to {_JOB_CHARACTERS} printable characters, "
            f"not {_shown(name)}"
        )
    return text


def _seconds(where: str, value: object) -> float:
    try:
        seconds = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if not abs(seconds) <= LONGEST_LEFT_S:  # what is no number is not less either
        raise ValueError(
            f"{where}: must be a number of seconds from now, from -{LONGEST_LEFT_S} to "
            f"{LONGEST_LEFT_S}, not {_shown(value)}"
        )
    return seconds


def _shown(value: object) -> str:
    """A client's value in a message, which is not as long as the client likes."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "that number"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _gateway_job(value: str) -> str | None:
    """What a header of somebody else's says, as far as it says anything."""
    name = "".join(filter(str.isprintable, value)).strip()
    return name[:_JOB_CHARACTERS] or None


def _gateway_seconds(value: str) -> float | None:
    """Likewise."""
    try:
        seconds = float(value) / 1000
    except ValueError:
        return None
    return seconds if abs(seconds) <= LONGEST_LEFT_S else None
