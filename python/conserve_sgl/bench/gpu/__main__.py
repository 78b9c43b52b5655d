"""The command behind `scripts/gpu/run.sh`, which says what it does."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import sys
from pathlib import Path

from conserve_sgl.bench.gpu.archive import unpack
from conserve_sgl.bench.gpu.parts import PARTS, Setting, part_named
from conserve_sgl.bench.gpu.plan import plan
from conserve_sgl.bench.gpu.run import Run
from conserve_sgl.bench.gpu.summary import summary
from conserve_sgl.bench.systems.server import stop_on_signals
from conserve_sgl.errors import ConserveError

_RESULTS = Path("out", "gpu")
_USAGE = 64


def main(argv: list[str] | None = None) -> int:
    """Run the command; the number of parts that failed."""
    given = _arguments(argv)
    known = [part.name for part in PARTS]
    if given.list:
        print("\n".join(known))
        return 0
    if wrong := [name for name in given.parts if name not in known]:
        print(f"no part is called {wrong[0]}; there are: {' '.join(known)}", file=sys.stderr)
        return _USAGE
    setting = Setting(
        results=given.results,
        flags=tuple(shlex.split(os.environ.get("CONSERVE_GPU_FLAGS", ""))),
        rehearse=given.rehearse,
        flashinfer=_folder("CONSERVE_FLASHINFER"),
        chosen_backend=given.backend,
    )
    parts = [part_named(name) for name in given.parts] or list(PARTS)
    minutes_s = math.inf if given.minutes is None else 60 * given.minutes
    if given.plan:
        for planned in plan(parts, minutes_s):
            print(f"{planned.starts_s:5.0f} s  {planned.part.name:<10} {planned.part.about}")
        return 0
    out = Path(os.environ.get("OUT") or given.results.with_name("gpu-archives"))
    try:
        if given.earlier is not None:
            unpack(given.earlier, setting.results)
        with stop_on_signals():
            run = Run(setting, out, limit_s=minutes_s, cache=_folder("CONSERVE_KERNEL_CACHE"))
            failed = run.all(parts, again=bool(given.parts))
    except ConserveError as e:
        print(f"{e}", file=sys.stderr)
        return _USAGE
    text = summary(setting)
    out.mkdir(parents=True, exist_ok=True)
    (setting.results / "summary.md").write_text(text, "utf-8")
    shutil.copy(setting.results / "summary.md", out)
    print(text)
    return failed


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu/run.sh", description="Measure conserve_sgl on one GPU, part by part."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="all that are not done, if none")
    parser.add_argument("--minutes", type=float, help="end within so long")
    parser.add_argument("--from", dest="earlier", type=Path, help="archives of an earlier run")
    parser.add_argument("--backend", help="of attention; what the part `check` chose, if none")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, for seconds")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="the folder for results")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--plan", action="store_true", help="say what fits, and run nothing")
    return parser.parse_args(argv)


def _folder(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


if __name__ == "__main__":
    raise SystemExit(main())
