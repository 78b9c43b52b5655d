"""The YAML of a benchmark: one load, and the systems that are measured under it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from conserve_sgl.bench.load.arrivals import Count, Positive
from conserve_sgl.bench.load.config import OfflineLoad, OnlineConfig
from conserve_sgl.bench.report.metrics import Slo
from conserve_sgl.bench.report.system import SystemConfig, check_names
from conserve_sgl.client.headers import OFFLINE_HEADERS
from conserve_sgl.config import ConserveConfig
from conserve_sgl.emulation import Emulation
from conserve_sgl.strict_yaml import load_yaml

__all__ = ["BenchConfig", "load_bench", "offline_headers"]


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
        check_names(self.systems)

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


def offline_headers(system: SystemConfig) -> Mapping[str, str]:
    """Of an offline request to `system`: stock SGLang knows no class."""
    return OFFLINE_HEADERS if system.kind == "conserve" else {}


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
    return msgspec.structs.replace(
        config,
        emulated=_found_from(path, config.emulated),
        online=config.online.found_from(path, trace),
        offline=config.offline.found_from(path),
    )


def _found_from(file: Path, emulated: Emulation | None) -> Emulation | None:
    """A device file's path is relative to `file`; a name stays."""
    if emulated is None or not emulated.device.endswith(".json"):
        return emulated
    return msgspec.structs.replace(emulated, device=str((file.parent / emulated.device).resolve()))
