"""`conserve doctor`: what is installed, which hooks take, what conflicts, and a verdict."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from conserve_sgl import __version__, compat
from conserve_sgl.config import CONFIG_ENV, ConserveConfig
from conserve_sgl.emulation import Emulation
from conserve_sgl.errors import ConserveError, HookError

__all__ = ["Finding", "Level", "examine", "host_cache"]

_LOW_HOST_GIB = 8
# SGLang's: what HiCache leaves free beside its pool, its default size over the device pool, and
# about what it makes of an unset --mem-fraction-static.
_HICACHE_RESERVE_GIB = 10
_DEFAULT_HICACHE_RATIO = 2.0
_USUAL_MEM_FRACTION = 0.88


class Level(Enum):
    """How a finding bears on the verdict."""

    OK = "[green]ok[/]"
    NOTE = "[yellow]note[/]"
    BAD = "[red]bad[/]"


class Finding(msgspec.Struct, frozen=True):
    """One row of the report."""

    what: str
    level: Level
    detail: str


def examine(console: Console, *, config: Path | None, flags: Sequence[str]) -> int:
    """Print the report to `console`.

    Args:
        config: the configuration to check, or None for the defaults.
        flags: SGLang flags to check for conflicts.

    Returns:
        The exit code: 0 when nothing is bad, else 1.
    """
    findings = [*_packages(), *_environment(), *_configuration(config)]
    if not _any_bad(findings):
        findings += [*_hooks(config), *_flags(flags), *_machine()]
    detail = Column("detail", overflow="fold")
    table = Table("what", "", detail, title=f"conserve {__version__}", title_justify="left")
    for finding in findings:
        table.add_row(escape(finding.what), finding.level.value, escape(finding.detail))
    console.print(table)
    bad = [finding.what for finding in findings if finding.level is Level.BAD]
    if bad:
        console.print(f"[red]A server would not start as configured:[/] {', '.join(bad)}")
        return 1
    console.print("[green]A server would start, with conserve in every process.[/]")
    return 0


def _any_bad(findings: list[Finding]) -> bool:
    return any(finding.level is Level.BAD for finding in findings)


def _packages() -> Iterator[Finding]:
    yield Finding("python", Level.OK, sys.version.split()[0])
    found = compat.sglang_version()
    try:
        compat.check_version(found)
        tested = found in compat.TESTED_VERSIONS
        detail = f"{found}" if tested else f"{found}, not tested ({compat.ALLOW_UNTESTED_ENV}=1)"
        yield Finding("sglang", Level.OK if tested else Level.NOTE, detail)
    except ConserveError as e:
        yield Finding("sglang", Level.BAD, str(e))
    try:
        yield Finding("torch", Level.OK, version("torch"))
    except PackageNotFoundError:
        yield Finding("torch", Level.BAD, "not installed")
    for group in ("sglang.srt.plugins", "sglang.srt.platforms"):
        ours = [ep for ep in entry_points(group=group) if ep.value.startswith("conserve_sgl.")]
        missing = "not found: reinstall conserve-sgl with pip"
        yield Finding(
            f"entry point in {group}",
            Level.OK if ours else Level.BAD,
            ours[0].name if ours else missing,
        )


def _environment() -> Iterator[Finding]:
    try:
        compat.check_environment(os.environ)
    except ConserveError as e:
        yield Finding("environment", Level.BAD, str(e))
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "conserve" not in [name.strip() for name in allowed.split(",")]:
        yield Finding("SGLANG_PLUGINS", Level.BAD, f"{allowed!r} leaves conserve out")


def _configuration(config: Path | None) -> Iterator[Finding]:
    if config is None:
        yield Finding("configuration", Level.NOTE, f"none given (${CONFIG_ENV}); using defaults")
        return
    try:
        ConserveConfig.load(config)
        yield Finding("configuration", Level.OK, str(config))
    except ConserveError as e:
        yield Finding("configuration", Level.BAD, str(e))


@contextmanager
def _configured(config: Path | None) -> Iterator[None]:
    """Within, the environment names a configuration that can be read."""
    before = os.environ.get(CONFIG_ENV)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as defaults:
        os.environ[CONFIG_ENV] = str(config or defaults.name)
        try:
            yield
        finally:
            os.environ.pop(CONFIG_ENV)
            if before is not None:
                os.environ[CONFIG_ENV] = before


def _hooks(config: Path | None) -> Iterator[Finding]:
    """Load every plugin as a server's process does, and look what is in place."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    from conserve_sgl.plugin import HOOK_TARGETS, verify

    with _configured(config):
        try:
            load_plugins()
            # A plugin that SGLang passed over has registered nothing, and says nothing.
            verify()
        except SystemExit as e:
            yield Finding("hooks", Level.BAD, str(e.code))
            return
        except HookError as e:
            yield Finding("hooks", Level.BAD, str(e))
            return
    for target in HOOK_TARGETS:
        others = {
            source.plugin_name
            for _, _, source in HookRegistry._hooks[target]
            if source is not None and source.plugin_name != "conserve"
        }
        shared = f", also hooked by {', '.join(sorted(others))}" if others else ""
        level = Level.NOTE if others else Level.OK
        yield Finding("hook", level, target.removeprefix("sglang.srt.") + shared)


def _flags(flags: Sequence[str]) -> Iterator[Finding]:
    if not flags:
        return
    from sglang.srt.server_args import prepare_server_args

    try:
        args = prepare_server_args(list(flags))
        found = compat.conflicts(args)
    except (SystemExit, Exception) as e:
        yield Finding("flags", Level.BAD, f"SGLang does not accept them: {e}")
        return
    for conflict in found:
        yield Finding("flags", Level.BAD, conflict)
    if not found:
        yield Finding("flags", Level.OK, " ".join(flags))
        yield host_cache(args, free_gib=_free_host_gib(), device_gib=_device_gib())


def host_cache(args: Any, *, free_gib: float, device_gib: float | None) -> Finding:
    """Whether preempted offline requests can leave their KV on the host.

    Args:
        args: SGLang's ServerArgs.
        free_gib: host memory that is free now.
        device_gib: memory of one accelerator; None on a machine without one.
    """

    def note(detail: str) -> Finding:
        return Finding("host cache", Level.NOTE, detail)

    if not args.enable_hierarchical_cache:
        return note(
            "off: preempted offline requests keep their KV only while the device has room; "
            "--enable-hierarchical-cache adds host memory"
        )
    if args.hicache_write_policy != "write_through":
        return note(
            f"--hicache-write-policy={args.hicache_write_policy} copies too late: with "
            "write_through giving way is a release"
        )
    if args.hicache_size:
        asked_gib = args.hicache_size * 1e9 / 2**30
    elif device_gib is not None:
        # What SGLang may use of the device is the most that its KV pool can be.
        share = args.mem_fraction_static or _USUAL_MEM_FRACTION
        asked_gib = (args.hicache_ratio or _DEFAULT_HICACHE_RATIO) * share * device_gib
    else:
        return Finding("host cache", Level.OK, "a multiple of the KV pool (--hicache-ratio)")
    asked_gib *= args.tp_size
    spare_gib = free_gib - (0 if device_gib is None else _HICACHE_RESERVE_GIB)
    detail = f"takes up to {asked_gib:.0f} GiB of {max(spare_gib, 0):.0f} GiB that are to spare"
    if asked_gib > spare_gib:
        return note(f"{detail}: lower --hicache-size or --hicache-ratio")
    return Finding("host cache", Level.OK, detail)


def _device_gib() -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def _free_host_gib() -> float:
    import psutil

    return psutil.virtual_memory().available / 2**30


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    if (emulated := Emulation.from_environment()) is not None:
        detail = f"{emulated.device}, emulated: no figure is this machine's"
        yield Finding("device", Level.NOTE, detail)
    elif torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("device", Level.OK, f"{torch.cuda.get_device_name(0)}, {gib:.0f} GiB")
    else:
        yield Finding("device", Level.OK, "no accelerator: conserve's CPU platform is used")
    memory = psutil.virtual_memory()
    free_gib, total_gib = memory.available / 2**30, memory.total / 2**30
    detail = f"{free_gib:.0f} of {total_gib:.0f} GiB free"
    low = free_gib < _LOW_HOST_GIB
    yield Finding("host memory", Level.NOTE if low else Level.OK, detail)
