"""The configuration tree: frozen, from one YAML file, units in the names.

`docs/configuration.md` lists every key; a test keeps that page complete.
"""

from __future__ import annotations

import os
import re
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from conserve_sgl.policy import OnlineReserve, SlackBudget
from conserve_sgl.policy.budget import StepTimes
from conserve_sgl.policy.slo import Factor, Seconds, Slo
from conserve_sgl.strict_yaml import load_yaml
from conserve_sgl.urls import check_base_url

__all__ = [
    "CONFIG_ENV",
    "BatchConfig",
    "CheckpointConfig",
    "ConserveConfig",
    "MemoryConfig",
    "OfflineConfig",
    "SlicesConfig",
    "SloConfig",
    "StatusConfig",
]

CONFIG_ENV = "CONSERVE_CONFIG"
"""Environment variable with the path of the YAML file; without it the plugin does nothing."""

_SMALLEST_CHUNK_TOKENS = 32

Count = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Milliseconds = Annotated[float, msgspec.Meta(gt=0)]
Hours = Annotated[float, msgspec.Meta(gt=0, le=876_600)]  # a hundred years
Folder = Annotated[str, msgspec.Meta(min_length=1)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class OfflineConfig(_Section):
    """How much offline work the server takes in.

    Args:
        queue_requests: offline requests held by the server, running ones included; more are
            answered 429.
        take: `queue`: offline requests up to `queue_requests`. `spare`: only as many as would run
            soon; the others are answered 429, to be sent to another server.
        retry_after_s: seconds that a 429 asks the client to wait at least.
        no_deadline_share: share of offline service that jobs without a deadline get while jobs
            with one wait.
        min_share: share of the device's time that offline work gets beside online rows, whatever
            their objectives leave.
    """

    queue_requests: Count = 4096
    take: Literal["queue", "spare"] = "queue"
    retry_after_s: Count = 5
    no_deadline_share: Share = 0.1
    min_share: Share = 0.0


class SloConfig(_Section):
    """What online requests are promised. An objective is a time, `200ms`, or a factor, `1.25x`, of
    what the engine needs without offline work.

    Args:
        ttft: from a request's arrival to its first token.
        tpot: for every token after the first, on average over the request.
        longest_gap: between two tokens, for offline work: a time, or a factor of `tpot`'s own
            value. Without it twice that, and at least 50 ms.
        yield_ms: how long an arrival that finds no online request may have to wait for offline
            work that cannot be interrupted: a step, or a slice of layers.
    """

    ttft: str = "2x"
    tpot: str = "2x"
    longest_gap: str | None = None
    yield_ms: Milliseconds = 5.0

    def __post_init__(self) -> None:
        self.objectives()  # raises ValueError
        if not self.yield_ms < inf:
            raise ValueError(f"yield_ms: {self.yield_ms} is no time")

    def objectives(self) -> Slo:
        """The objectives as the policy takes them."""
        return Slo(
            ttft=_objective("ttft", self.ttft),
            tpot=_objective("tpot", self.tpot),
            longest_gap=self.longest_gap and _objective("longest_gap", self.longest_gap),
        )


_OBJECTIVE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>ms|x)")


def _objective(key: str, text: str) -> Seconds | Factor:
    found = _OBJECTIVE.fullmatch(text)
    if found is None:
        raise ValueError(f"{key}: {text!r} is not an objective such as 200ms or 1.25x")
    number = float(found["number"])
    return Seconds(number / 1000) if found["unit"] == "ms" else Factor(number)


class MemoryConfig(_Section):
    """How the KV pool is shared.

    Args:
        online_reserve: share of the KV pool that admitting offline work leaves free at most; how
            much it is at a time follows the recent online demand.
    """

    online_reserve: Share = 0.25


class CheckpointConfig(_Section):
    """How running offline requests are checkpointed, so that giving way costs little.

    Args:
        enabled: False computes a request that gave way again, as SGLang does.
        stride_tokens: the most by which a running request grows between two checkpoints; fewer
            where computing a token again is dear or requests give way often.
    """

    enabled: bool = True
    stride_tokens: Count = 1024


class SlicesConfig(_Section):
    """How an offline prefill makes way for an online arrival.

    Args:
        enabled: False runs every offline prefill in one piece.
        mode: `eager` makes way at the next layer boundary, `slack` when the arrival's first token
            would else miss `slo.ttft`.
    """

    enabled: bool = True
    mode: Literal["eager", "slack"] = "eager"


class BatchConfig(_Section):
    """OpenAI Files and Batches on the server.

    Args:
        storage_dir: the folder for files and batches; without it there are no such routes.
        retention_hours: how long files, results and finished batches are kept.
        max_in_flight: requests of all batches under way at a time.
        max_requests: requests that a batch may have.
        max_file_bytes: size of an uploaded file.
        max_storage_bytes: size of all files; an upload beyond it is refused.
        max_deaths: a request that was in flight at so many deaths of the server has failed.
        start: `held` sends nothing of any batch until `conserve tune --batches run`.
        endpoints: base URLs of the servers that the requests go to, this one among them if it is
            to do its part; with neither these nor `discover` all go to this one.
        discover: base URL of a gateway of SGLang whose workers are the endpoints, instead.
    """

    storage_dir: Folder | None = None
    retention_hours: Hours = 720.0
    max_in_flight: Count = 256
    max_requests: Count = 50_000
    max_file_bytes: Count = 200 << 20
    max_storage_bytes: Count = 20 << 30
    max_deaths: Count = 2
    start: Literal["run", "held"] = "run"
    endpoints: list[str] = []
    discover: str | None = None

    def __post_init__(self) -> None:
        if self.storage_dir is not None and self.storage_dir.startswith("~"):
            raise ValueError("storage_dir: ~ is not filled in here; write the whole path")
        if self.endpoints and self.discover is not None:
            raise ValueError(
                "endpoints: servers, or the gateway that has them (discover): leave one of the two "
                "out"
            )
        for url in self.endpoints:
            _check_url("endpoints", url)
            if self.endpoints.count(url) > 1:
                raise ValueError(f"endpoints: {url!r} is given twice")
        if self.discover is not None:
            _check_url("discover", self.discover)


def _check_url(key: str, url: str) -> None:
    try:
        check_base_url(url)
    except ValueError as e:
        raise ValueError(f"{key}: {e}") from e


class StatusConfig(_Section):
    """What the server keeps for people to look at.

    Args:
        enabled: keeps the latest steps and the latencies of the last minutes, and answers
            `/conserve/status`.
    """

    enabled: bool = False


class ConserveConfig(_Section):
    """The whole of it."""

    slo: SloConfig = SloConfig()
    offline: OfflineConfig = OfflineConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    slices: SlicesConfig = SlicesConfig()
    batch: BatchConfig = BatchConfig()
    status: StatusConfig = StatusConfig()

    @classmethod
    def load(cls, path: Path | str) -> ConserveConfig:
        """Read the file at `path`.

        Raises:
            InputError: naming file, line and key.
        """
        return load_yaml(path, cls)

    @classmethod
    def from_environment(cls) -> ConserveConfig | None:
        """The configuration that `CONSERVE_CONFIG` names, or None when it is not set.

        Raises:
            InputError: it is set, but the file cannot be used.
        """
        path = os.environ.get(CONFIG_ENV)
        return cls.load(path) if path else None

    def budget(self, times: StepTimes, *, page_tokens: int) -> SlackBudget:
        """The budget by this configuration.

        Args:
            times: the latency model of the engine that it plans for.
            page_tokens: KV page of that engine.
        """
        return SlackBudget(
            times,
            slo=self.slo.objectives(),
            yield_s=self.slo.yield_ms / 1000,
            reserve=OnlineReserve(at_most=self.memory.online_reserve),
            smallest_chunk=max(page_tokens, _SMALLEST_CHUNK_TOKENS),
            min_share=self.offline.min_share,
        )
