"""Runs the parts that fit, one after the other, and lets none of them outlive its time."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from conserve_sgl.bench.gpu.archive import KERNELS, Packer
from conserve_sgl.bench.gpu.parts import Part, Setting
from conserve_sgl.bench.gpu.plan import END_S, plan
from conserve_sgl.bench.gpu.state import State, States
from conserve_sgl.bench.report.environment import Environment, clocks, environment
from conserve_sgl.bench.systems.server import ManagedProcess
from conserve_sgl.errors import ServerError
from conserve_sgl.profile import DIR_ENV

__all__ = ["PART_ENV", "Run"]

PART_ENV = "CONSERVE_GPU_PART"
"""In the environment of everything that a part starts: its own name in this run."""

_GRACE_S = 12.0
_PACK_EVERY_S = 2.0
_POLL_S = 0.2
_SHOWN_LINES = 25


class Run:
    """One run on one machine.

    Args:
        setting: of all parts.
        out: gets the archives.
        limit_s: from now; no part is begun that would not fit, and none outlives it.
        cache: folder of compiled kernels, to be carried to the next machine.
    """

    def __init__(
        self, setting: Setting, out: Path, *, limit_s: float, cache: Path | None = None
    ) -> None:
        self._setting, self._limit_s = setting, limit_s
        self._start_s = time.monotonic()
        setting.machine.mkdir(parents=True, exist_ok=True)
        setting.keep_backend()
        self._states = States(setting.machine / "parts.json")
        self._cache, self._cache_before = cache, _sizes(cache)
        self._packer = Packer(out, self._folders)
        self._id = uuid.uuid4().hex[:12]
        self._environment = environment()
        text = msgspec.json.format(msgspec.json.encode(self._environment), indent=1)
        (setting.machine / "environment.json").write_bytes(text)

    def all(self, parts: Sequence[Part], *, again: bool = False) -> int:
        """Run what fits of `parts` and is not done, `again` all of them; how many failed."""
        waiting = [part for part in parts if again or not self._states.is_done(part.name)]
        self._say_plan(waiting)
        failed = 0
        try:
            while planned := plan(waiting, self._left_s()):
                part = planned[0].part
                waiting.remove(part)
                # Asked only now: an earlier part decides what there is to do, such as the backend.
                if self._is_possible(part):
                    # A rehearsal shows the order of things; how long a CPU takes does not matter.
                    limit_s = planned[0].limit_s
                    if self._setting.rehearse:
                        limit_s = self._left_s() - END_S
                    failed += self._run(part, limit_s).failed
        finally:
            self._packer.close()
        for part in waiting:
            self._say(f"no time was left for {part.name}")
        for name, files in self._packer.left_out.items():
            if files:
                self._say(f"{name}: too large to carry: {', '.join(files)}")
        return failed

    def _left_s(self) -> float:
        return self._limit_s - (time.monotonic() - self._start_s)

    def _say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._start_s:4.0f} s] {what}", flush=True)

    def _say_plan(self, parts: Sequence[Part]) -> None:
        for planned in plan(parts, self._left_s()):
            self._say(f"planned for {planned.starts_s:4.0f} s: {planned.part.name}")

    def _is_possible(self, part: Part) -> bool:
        obstacle = part.obstacle(self._setting)
        if obstacle is not None:
            self._say(f"{part.name} is left out: {obstacle}")
        return obstacle is None

    # ------------------------------------------------------------------ one part

    def _run(self, part: Part, limit_s: float) -> State:
        """Its commands in turn, until one fails or the time is up."""
        began_s = time.monotonic()
        ends_s = began_s + limit_s
        self._say(f"== {part.name}, at most {limit_s:.0f} s: {part.about}")
        token = f"{part.name}-{self._id}"
        status: int | None = 0
        try:
            commands = part.commands(self._setting, lambda: ends_s - time.monotonic())
            for number, argv in zip(itertools.count(1), commands, strict=False):
                log = self._setting.machine / "logs" / f"{part.name}-{number}.log"
                status = self._command(part, [_python(), *argv], log, token, ends_s)
                if status != 0:
                    self._show_end(log)
                    break
        finally:
            _end_all(token)
        seconds = time.monotonic() - began_s
        state = State(status, round(seconds, 1), round(began_s - self._start_s, 1))
        self._states.note(part.name, state)
        at_clocks = clocks()
        self._note_device(part, at_clocks)
        self._say(f"== {part.name}: {state.text} after {seconds:.0f} s; GPU: {at_clocks}")
        self._packer.poke()
        return state

    def _note_device(self, part: Part, at_clocks: str | None) -> None:
        """Beside what a part measured that is no benchmark: those say it of every run."""
        folder = self._setting.costs / part.name
        if folder.is_dir():
            on = {"environment": self._environment, "clocks": at_clocks}
            (folder / "device.json").write_bytes(msgspec.json.format(msgspec.json.encode(on)))

    def _command(
        self, part: Part, argv: list[str], log: Path, token: str, ends_s: float
    ) -> int | None:
        """Its exit status; None when it was cut off."""
        process = ManagedProcess(
            argv,
            log_path=log,
            env=self._env(part, token),
            stop_signal=signal.SIGINT,
            grace_s=_GRACE_S,
        )
        try:
            with process:
                packed_s = time.monotonic()
                while process.wait(_POLL_S) is None:
                    now_s = time.monotonic()
                    if now_s > ends_s:
                        return None
                    if now_s - packed_s > _PACK_EVERY_S:
                        self._packer.poke()
                        packed_s = now_s
                return process.returncode
        except ServerError as e:
            log.write_text(f"{e}\n", "utf-8")
            return 127

    def _env(self, part: Part, token: str) -> dict[str, str]:
        setting = self._setting
        env = {
            PART_ENV: token,
            DIR_ENV: str((setting.machine / "profiles").resolve()),
            "PYTHONUNBUFFERED": "1",
            **part.env(setting),
        }
        if setting.rehearse:
            env |= {"CUDA_VISIBLE_DEVICES": "", "SGLANG_PLATFORM": "conserve_cpu"}
        return env

    def _show_end(self, log: Path) -> None:
        lines = log.read_text("utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        print("\n".join(line[:300] for line in lines), flush=True)

    # ----------------------------------------------------------------- archives

    def _folders(self) -> dict[str, Path]:
        """What leaves the machine, by the name of its archive."""
        results = self._setting.results
        found = {path.name: path for path in sorted(results.iterdir()) if path.is_dir()}
        if self._cache is not None and _sizes(self._cache) != self._cache_before:
            found[f"{KERNELS}{_short_name(self._environment)}"] = self._cache
        return found


def _python() -> str:
    return os.environ.get("PYTHON") or sys.executable


def _sizes(folder: Path | None) -> dict[Path, int]:
    if folder is None:
        return {}
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _short_name(on: Environment) -> str:
    """Of the GPU: h100, a100."""
    found = re.search(r"\b[A-Z]{1,3}\d{2,4}\w*\b", on.gpus[0]) if on.gpus else None
    return found[0].lower() if found else "cpu"


def _end_all(token: str) -> None:
    """Kill what a part left behind: a server whose starter was killed, say."""
    for pid in _started_with(f"{PART_ENV}={token}".encode()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _started_with(setting: bytes) -> Iterator[int]:
    """Processes whose environment says so."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if setting in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)
