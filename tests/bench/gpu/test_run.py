"""Parts are run in turn, as small programs here, and none outlives its time."""

from __future__ import annotations

import os
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conserve_sgl.bench.gpu import run as run_module
from conserve_sgl.bench.gpu.archive import unpack
from conserve_sgl.bench.gpu.parts import Part, Setting
from conserve_sgl.bench.gpu.plan import END_S
from conserve_sgl.bench.gpu.run import Run
from conserve_sgl.bench.gpu.state import States

BIG_S = 1000.0


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(results=tmp_path / "results", rehearse=True)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def part(name: str, *scripts: str, **fields: object) -> Part:
    def commands(_setting: Setting, _left_s: Callable[[], float]):
        yield from (["-c", script] for script in scripts)

    return Part(**{
        "name": name, "about": "a part", "least_s": 0, "wants_s": 10, "commands": commands
    } | fields)  # fmt: skip


def state_of(setting: Setting, name: str):
    return States(setting.machine / "parts.json").by_part[name]


def test_a_part_that_fails_leaves_the_others(setting: Setting, out: Path, capfd):
    parts = [part("bad", "print('why'); raise SystemExit(5)", "no = 1"), part("good", "print()")]

    assert Run(setting, out, limit_s=BIG_S).all(parts) == 1

    assert state_of(setting, "bad").text == "failed (5)"
    assert state_of(setting, "good").text == "done"
    assert not (setting.machine / "logs" / "bad-2.log").exists()
    assert "why" in capfd.readouterr().out


def test_what_is_done_is_not_done_again_unless_it_is_named(setting: Setting, out: Path):
    parts = [part("once", "open('ran', 'a').write('x')")]
    ran = Path("ran")
    for again in (False, False, True):
        Run(setting, out, limit_s=BIG_S).all(parts, again=again)
    assert ran.read_text() == "xx"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_part_that_is_out_of_time_ends_with_all_it_started(
    setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_module, "_GRACE_S", 0.1)
    hidden = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n"
        "open('pid', 'w').write(str(child.pid))\n"
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "time.sleep(600)\n"
    )
    never = part("after", "print()")

    failed = Run(setting, out, limit_s=END_S + 3).all([part("hangs", hidden), never])

    assert failed == 0
    assert state_of(setting, "hangs").text == "out of time"
    assert "after" not in States(setting.machine / "parts.json").by_part
    pid = int(Path("pid").read_text())
    until_s = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_results_leave_as_they_come_and_a_later_run_goes_on(setting: Setting, out: Path):
    folder = str(setting.costs / "a")
    write = f"import os; os.makedirs({folder!r}); open(os.path.join({folder!r}, 'figures'), 'w')"
    Run(setting, out, limit_s=BIG_S).all([part("a", write)])

    fresh = Setting(results=setting.results.with_name("fresh"), rehearse=True)
    assert unpack(out, fresh.results) == ["costs", "machine"]
    assert Run(fresh, out, limit_s=BIG_S).all([part("a", "raise SystemExit(1)")]) == 0
    assert (fresh.costs / "a" / "figures").exists()
    assert b"clocks" in (fresh.costs / "a" / "device.json").read_bytes()


def test_an_obstacle_is_looked_for_when_the_part_is_due(setting: Setting, out: Path, capfd):
    """What an earlier part decided counts."""
    choose = part("choose", "open('chosen', 'w')")
    second = part(
        "second",
        "raise SystemExit(1)",
        obstacle=lambda _: "it was chosen" if os.path.exists("chosen") else None,
    )

    assert Run(setting, out, limit_s=BIG_S).all([choose, second]) == 0
    assert "second is left out: it was chosen" in capfd.readouterr().out


def test_compiled_kernels_come_back_if_there_are_new_ones(setting: Setting, out: Path):
    cache = Path("cache")
    cache.mkdir()
    (cache / "old").write_text("a kernel")
    Run(setting, out, limit_s=BIG_S, cache=cache).all([part("none", "print()")])
    assert not list(out.glob("cache-*"))

    Run(setting, out, limit_s=BIG_S, cache=cache).all([part("one", "open('cache/new', 'w')")])
    (archive,) = out.glob("cache-*.tar.xz")
    with tarfile.open(archive) as tar:
        assert set(tar.getnames()) == {"cache/old", "cache/new"}
    assert "cache" not in unpack(out, Path("again"))
