"""What a result was measured on: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import msgspec

from conserve_sgl.machine import cpu_name

__all__ = ["COMMIT_ENV", "Environment", "clocks", "environment"]

COMMIT_ENV = "CONSERVE_COMMIT"
"""Environment variable with the commit, for a checkout that was carried without its history."""

_DISTRIBUTIONS = ("conserve-sgl", "sglang", "torch", "transformers", "numpy", "aiohttp")


class Environment(msgspec.Struct, frozen=True):
    """`commit` is None outside a git checkout; it ends in "+" when files differ from it.

    `driver` is that of the GPUs, with their greatest clocks and power; None without one.
    """

    cpu: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...]
    system: str
    python: str
    versions: dict[str, str]
    commit: str | None
    driver: str | None = None

    @property
    def hardware(self) -> str:
        """One line for a table's caption."""
        return ", ".join(
            [*self.gpus, self.cpu, f"{self.cores} cores", f"{self.memory_gib:.0f} GiB"]
        )


def environment() -> Environment:
    """Of this process; imports none of the packages that it names."""
    return Environment(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        gpus=tuple(_gpus("name").splitlines()),
        system=platform.platform(),
        python=platform.python_version(),
        versions=_versions(),
        commit=_commit(),
        driver=_gpus("driver_version,clocks.max.sm,clocks.max.memory,power.limit,memory.total")
        or None,
    )


def clocks() -> str | None:
    """Clocks, power and temperature of the GPUs right now, a line each; None without one."""
    return (
        _gpus("clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active") or None
    )


def _gpus(query: str) -> str:
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _versions() -> dict[str, str]:
    installed = {}
    for name in _DISTRIBUTIONS:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _commit() -> str | None:
    here = str(Path(__file__).parent)
    # Installed into some other project's tree, that project's commit would say nothing of us.
    if not _output("git", "-C", here, "ls-files", "__init__.py"):
        return os.environ.get(COMMIT_ENV) or None
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed else commit or None


def _output(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
