"""The YAML of a simulation: a device, a load, and the systems that are run on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from conserve_sgl.bench.load.backlog import RandomPrompts
from conserve_sgl.bench.load.config import OfflineLoad, OnlineConfig
from conserve_sgl.bench.report.system import SystemConfig, check_names
from conserve_sgl.config import ConserveConfig, SloConfig
from conserve_sgl.device.table import Device, load_device
from conserve_sgl.errors import InputError
from conserve_sgl.simulate.engine import Host
from conserve_sgl.simulate.flags import ServerFlags
from conserve_sgl.strict_yaml import load_yaml

__all__ = ["Simulation", "SystemRun", "load_simulation"]

_BASELINES = (
    SystemConfig(name="online-only", kind="stock", load="online"),
    SystemConfig(name="offline-only", kind="stock", load="offline"),
)


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Server(_Config):
    """What every system's server is started with; a system's own flags come after these."""

    flags: tuple[str, ...] = ()


class _Objectives(_Config):
    """A setting of the dial: what it leaves out is as everywhere."""

    ttft: str | None = None
    tpot: str | None = None


class _File(_Config, kw_only=True):
    seed: Annotated[int, msgspec.Meta(ge=0)]
    device: str
    slo: SloConfig
    conserve: dict[str, Any] = {}
    server: _Server = _Server()
    host: Host = Host()
    online: OnlineConfig
    offline: OfflineLoad
    dial: tuple[_Objectives, ...] = ()
    systems: Annotated[tuple[SystemConfig, ...], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        check_names(self.systems)


class SystemRun(msgspec.Struct, frozen=True, kw_only=True):
    """A system to run, and what it is held to.

    Args:
        system: its name, kind and load.
        flags: those of all servers and its own.
        conserve: its configuration; None for a stock system.
        slo: the objectives that it is judged by; those of `conserve` for that kind of system.
        on_dial: whether it is a point of the dial.
    """

    system: SystemConfig
    flags: ServerFlags
    conserve: ConserveConfig | None
    slo: SloConfig
    on_dial: bool = False


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """A whole simulation; every run gets the same stream and the same backlog.

    Args:
        path: of its file.
        seed: of stream, backlog and noise.
        device: read and checked.
        flags: of a server without flags of a system's own.
        host: what happens beside the device.
        online, offline: the load.
        runs: online-only and offline-only first, then the systems, then the dial.
    """

    path: Path
    seed: int
    device: Device
    flags: ServerFlags
    host: Host
    online: OnlineConfig
    offline: OfflineLoad
    runs: tuple[SystemRun, ...]


def load_simulation(
    path: Path,
    *,
    device: str | None = None,
    conserve: Path | None = None,
    trace: Path | None = None,
    duration_s: float | None = None,
    systems: Sequence[str] = (),
    changes: Mapping[str, str] | None = None,
) -> Simulation:
    """Read the simulation at `path`.

    Args:
        path: the file; paths in it may hold environment variables, and are relative to it.
        device: name or file, instead of the file's.
        conserve: a configuration of conserve, instead of the file's section; its objectives too.
        trace: instead of the path of the online trace.
        duration_s: of the stream, instead of the file's.
        systems: only these, and the two baselines.
        changes: see `load_yaml`.

    Raises:
        InputError: naming file, line and key.
    """
    file = load_yaml(path, _File, changes=changes)
    given = None if conserve is None else ConserveConfig.load(conserve)
    online = file.online.found_from(path, trace)
    if not isinstance(file.offline.backlog, RandomPrompts):
        reason = "the simulator needs lengths in tokens: kind random"
        raise InputError(path, reason, key="offline.backlog")
    online = msgspec.structs.replace(online, duration_s=duration_s or online.duration_s)
    return Simulation(
        path=path,
        seed=file.seed,
        device=_device(path, device or file.device),
        flags=_flags(path, "server.flags", file.server.flags),
        host=file.host,
        online=online,
        offline=file.offline,
        runs=tuple(_runs(path, file, given, systems)),
    )


def _device(path: Path, name: str) -> Device:
    return load_device(path.parent / name if name.endswith(".json") else name)


def _flags(path: Path, key: str, flags: Sequence[str]) -> ServerFlags:
    try:
        return ServerFlags.of(flags)
    except ValueError as e:
        raise InputError(path, str(e), key=key) from e


def _runs(
    path: Path, file: _File, given: ConserveConfig | None, only: Sequence[str]
) -> list[SystemRun]:
    names = [system.name for system in file.systems]
    for name in only:
        if name not in names:
            reason = f"no system is named {name}; there are {', '.join(names)}"
            raise InputError(path, reason, key="systems")
    runs = []
    for i, system in enumerate(file.systems):
        baseline = system.is_online_baseline or system.is_offline_ceiling
        if only and system.name not in only and not baseline:
            continue
        runs.append(_run(path, f"systems[{i}]", file, system, given))
    for baseline in _BASELINES:
        if not any(_stands_for(run.system, baseline) for run in runs):
            runs.append(_run(path, "server", file, baseline, given))
    runs.sort(key=_place)
    return runs + _dial(path, file, runs)


def _place(run: SystemRun) -> int:
    """The baselines first: relative objectives and shares are of them."""
    if run.system.is_online_baseline:
        return 0
    return 1 if run.system.is_offline_ceiling else 2


def _stands_for(system: SystemConfig, baseline: SystemConfig) -> bool:
    return system.kind == baseline.kind and system.load == baseline.load


def _run(
    path: Path, key: str, file: _File, system: SystemConfig, given: ConserveConfig | None
) -> SystemRun:
    flags = _flags(path, f"{key}.flags", (*file.server.flags, *system.flags))
    slo = file.slo if given is None else given.slo
    if system.kind == "stock":
        return SystemRun(system=system, flags=_classes(flags, system), conserve=None, slo=slo)
    common = file.conserve if given is None else msgspec.to_builtins(given)
    merged = _merged({"slo": msgspec.to_builtins(slo)}, common, system.conserve or {})
    try:
        conserve = msgspec.convert(merged, ConserveConfig)
    except msgspec.ValidationError as e:
        raise InputError(path, str(e), key=f"{key}.conserve") from e
    return SystemRun(system=system, flags=flags, conserve=conserve, slo=conserve.slo)


def _classes(flags: ServerFlags, system: SystemConfig) -> ServerFlags:
    """Priority scheduling puts online first only where requests say so."""
    urgency = [body.get("priority", 0) for body in (system.online_body, system.offline_body)]
    first = flags.options.priority and urgency[0] > urgency[1]
    options = msgspec.structs.replace(flags.options, priority=first)
    return msgspec.structs.replace(flags, options=options)


def _merged(*sections: Mapping[str, Any]) -> dict[str, Any]:
    """Later sections over earlier ones, key by key."""
    merged: dict[str, Any] = {}
    for section in sections:
        for key, value in section.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = _merged(merged[key], value) if both else value
    return merged


def _dial(path: Path, file: _File, runs: Sequence[SystemRun]) -> list[SystemRun]:
    """Every conserve system that has no objectives of its own, at every setting."""
    turned = []
    for run in runs:
        if run.conserve is None or "slo" in (run.system.conserve or {}):
            continue
        for i, setting in enumerate(file.dial):
            asked = {k: v for k, v in msgspec.to_builtins(setting).items() if v is not None}
            try:
                slo = msgspec.structs.replace(run.slo, **asked)
                slo.objectives()
            except ValueError as e:
                raise InputError(path, str(e), key=f"dial[{i}]") from e
            system = msgspec.structs.replace(
                run.system,
                name=f"{run.system.name}-{'-'.join(asked.values())}",
                dial=", ".join(f"{k} {v}" for k, v in asked.items()),
                conserve={**(run.system.conserve or {}), "slo": msgspec.to_builtins(slo)},
            )
            conserve = msgspec.structs.replace(run.conserve, slo=slo)
            turned.append(
                SystemRun(system=system, flags=run.flags, conserve=conserve, slo=slo, on_dial=True)
            )
    return turned
