"""The YAML of a demo run, as one frozen tree."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from conserve_sgl.bench.load.arrivals import Count, NotNegative, Positive
from conserve_sgl.bench.load.config import OnlineConfig
from conserve_sgl.bench.report.metrics import Slo

__all__ = ["DemoConfig", "JobConfig", "ServerConfig", "fill"]

Command = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class ServerConfig(_Config):
    """How the server is started.

    `command` is an argument list in which {python}, {model}, {port} and {out} are filled in.
    """

    command: Command
    ready_timeout_s: Positive = 300.0
    warmup_requests: Count = 4

    def __post_init__(self) -> None:
        _check_placeholders(self.command, {"python", "model", "port", "out"})


class JobConfig(_Config):
    """The job beside the stream.

    `command` is an argument list in which {python}, {url} and {out} are filled in, and `output`
    the folder of its results, in which {out} is. It starts `lead_s` before the stream; after the
    stream it is stopped with SIGINT, and killed when it has not ended `stop_s` later.
    """

    command: Command
    output: str
    lead_s: NotNegative = 8.0
    stop_s: NotNegative = 30.0

    def __post_init__(self) -> None:
        _check_placeholders(self.command, {"python", "url", "out"})
        _check_placeholders((self.output,), {"out"})


class DemoConfig(_Config):
    """A whole demo: one server, the stream alone, then the stream beside the job."""

    seed: Annotated[int, msgspec.Meta(ge=0)]
    slo: Slo
    server: ServerConfig
    online: OnlineConfig
    offline: JobConfig


def fill(text: str, values: dict[str, str]) -> str:
    """`text` with each {name} replaced by its value."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]], text)


_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def _check_placeholders(texts: tuple[str, ...], known: set[str]) -> None:
    for name in _PLACEHOLDER.findall(" ".join(texts)):
        if name not in known:
            names = ", ".join(f"{{{k}}}" for k in sorted(known))
            raise ValueError(f"{{{name}}} is not one of {names}")
