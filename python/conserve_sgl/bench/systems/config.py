"""The YAML of a benchmark: one load, and the systems that are measured under it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from conserve_sgl.bench.demo.config import OnlineConfig
from conserve_sgl.bench.load.arrivals import Count, NotNegative, Positive
from conserve_sgl.bench.load.backlog import Backlog
from conserve_sgl.bench.report.metrics import Slo
from conserve_sgl.config import ConserveConfig
from conserve_sgl.emulation import Emulation
from conserve_sgl.errors import InputError
from conserve_sgl.jobs.client import OFFLINE_HEADERS
from conserve_sgl.strict_yaml import load_yaml

__all__ = ["BenchConfig", "OfflineLoad", "SystemConfig", "load_bench", "with_path"]

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class CommonFlags(_Config):
    """What every system's server is started with; a system's own flags come after these.

    With `shared`, systems in a row whose servers are started alike are measured on one server, its
    caches emptied between them: for machines where a start takes as long as a measurement. Those of
    conserve are alike, too, when they differ in objectives that `conserve tune` can set. With
    `step_log` every server, stock or not, leaves a record of its steps.
    """

    flags: tuple[str, ...] = ()
    env: dict[str, str] = {}
    ready_timeout_s: Positive = 600.0
    warmup_requests: Count = 4
    shared: bool = False
    step_log: bool = False


class OfflineLoad(_Config):
    """The backlog: `in_flight` requests at a time, from `lead_s` before the stream begins."""

    backlog: Backlog
    in_flight: Count
    lead_s: NotNegative = 8.0


class SystemConfig(_Config):
    """One server to measure.

    `load` says which of the two loads it gets. `online_body` and `offline_body` are request
    fields of its own; offline requests to a `conserve` system carry conserve's header, too.
    `conserve` is the content of the file that CONSERVE_CONFIG names. Systems that differ in the
    setting of one dial say it in `dial`, and are joined by a line in the plot of the trade-off.
    `slo` and `window_s` stand for the benchmark's objectives and duration: a system that is set to
    another objective is judged by that one, and one that is a point of a curve may be shorter.
    """

    name: Name
    kind: Literal["stock", "conserve"]
    load: Literal["both", "online", "offline"] = "both"
    flags: tuple[str, ...] = ()
    env: dict[str, str] = {}
    online_body: dict[str, Any] = {}
    offline_body: dict[str, Any] = {}
    conserve: dict[str, Any] | None = None
    dial: str | None = None
    slo: Slo | None = None
    window_s: Positive | None = None

    def __post_init__(self) -> None:
        if self.conserve is not None and self.kind != "conserve":
            raise ValueError("a stock system takes no conserve section")

    @property
    def offline_headers(self) -> dict[str, str]:
        return OFFLINE_HEADERS if self.kind == "conserve" else {}

    @property
    def is_online_baseline(self) -> bool:
        """Whether it measures stock SGLang without offline work."""
        return self.kind == "stock" and self.load == "online"

    @property
    def is_offline_ceiling(self) -> bool:
        """Whether it measures stock SGLang with offline work alone."""
        return self.kind == "stock" and self.load == "offline"


class BenchConfig(_Config, kw_only=True):
    """A whole benchmark. Every system gets the same online stream and the same backlog.

    With `emulated` every server runs on that device instead of this machine's. All times in the
    file, the objectives of conserve among them, are the device's.
    """

    seed: Annotated[int, msgspec.Meta(ge=0)]
    repeats: Count = 1
    slo: Slo
    model: str | None = None
    emulated: Emulation | None = None
    server: CommonFlags = CommonFlags()
    online: OnlineConfig
    offline: OfflineLoad
    systems: Annotated[tuple[SystemConfig, ...], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        names = [system.name for system in self.systems]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two systems are named {name}")

    @property
    def time_scale(self) -> float:
        """Seconds of this machine for a second of the file."""
        return 1.0 if self.emulated is None else self.emulated.time_scale

    def only(self, names: Sequence[str]) -> BenchConfig:
        """With the named systems alone, in the order of the file.

        Raises:
            ValueError: a name that no system has.
        """
        known = [system.name for system in self.systems]
        for name in names:
            if name not in known:
                raise ValueError(f"no system is named {name}; there are {', '.join(known)}")
        chosen = tuple(system for system in self.systems if system.name in names)
        return msgspec.structs.replace(self, systems=chosen)

    def server_argv(self, system: SystemConfig, model: str, port: int) -> list[str]:
        """The command line of a system's server; conserve differs by its environment alone."""
        sglang = [sys.executable, "-c", "from sglang.cli.main import main; main()", "serve"]
        place = ["--model-path", model, "--host", "127.0.0.1", "--port", str(port)]
        # Its counter of idle seconds is how the idle share is measured.
        return [*sglang, *place, "--enable-metrics", *self.server.flags, *system.flags]


class _ConserveSection(msgspec.Struct, frozen=True):
    conserve: ConserveConfig | None = None


class _ConserveSections(msgspec.Struct, frozen=True):
    """The same file, seen by the type that knows the keys of conserve."""

    systems: tuple[_ConserveSection, ...] = ()


def load_bench(path: Path, *, trace: Path | None = None) -> BenchConfig:
    """Read the benchmark at `path`; `trace` stands for the path of its online trace.

    Paths may hold environment variables, and are relative to the file.

    Raises:
        InputError: naming file, line and key; the sections for conserve are checked, too.
    """
    config = load_yaml(path, BenchConfig)
    load_yaml(path, _ConserveSections)
    arrivals = config.online.arrivals
    if trace is not None and not hasattr(arrivals, "path"):
        raise InputError(path, "is not a trace, so --trace cannot stand for it", key=_ARRIVALS)
    arrivals = with_path(path, arrivals, _ARRIVALS, trace)
    backlog = with_path(path, config.offline.backlog, "offline.backlog", None)
    return msgspec.structs.replace(
        config,
        emulated=_found_from(path, config.emulated),
        online=msgspec.structs.replace(config.online, arrivals=arrivals),
        offline=msgspec.structs.replace(config.offline, backlog=backlog),
    )


def _found_from(file: Path, emulated: Emulation | None) -> Emulation | None:
    """A device file's path is relative to `file`; a name stays."""
    if emulated is None or not emulated.device.endswith(".json"):
        return emulated
    return msgspec.structs.replace(emulated, device=str((file.parent / emulated.device).resolve()))


_ARRIVALS = "online.arrivals"


def with_path(file: Path, source: Any, key: str, given: Path | None) -> Any:
    """`source` of the `file` with its path, if it has one, made ready to be opened.

    Args:
        file: what the path is relative to.
        source: arrivals, or a backlog.
        key: where it stands in the file.
        given: stands for its path.

    Raises:
        InputError: an environment variable in it is not set.
    """
    if not hasattr(source, "path"):
        return source
    if given is not None:
        return msgspec.structs.replace(source, path=str(given))
    expanded = os.path.expandvars(source.path)
    if "$" in expanded:
        raise InputError(file, f"{source.path}: set that variable", key=f"{key}.path")
    return msgspec.structs.replace(source, path=str(file.parent / expanded))
