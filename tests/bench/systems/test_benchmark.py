"""Whole benchmarks against a fake engine."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from conserve_sgl.bench.command import compare_folders, run_bench
from conserve_sgl.bench.report.results import by_system, read_folder, run_folder
from conserve_sgl.bench.report.system import SystemConfig
from conserve_sgl.bench.report.tables import Harvest
from conserve_sgl.bench.systems.config import BenchConfig
from conserve_sgl.config import CONFIG_ENV
from conserve_sgl.emulation import DEVICE_ENV, SCALE_ENV
from conserve_sgl.errors import InputError, ServerError

LENGTHS = {"median_tokens": 5, "max_tokens": 5}


class Bench:
    """A benchmark in a folder of its own, whose servers are fake engines."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.console = Console(file=io.StringIO())
        self.content = {
            "seed": 1,
            "slo": {"ttft_ms": 60_000, "tpot_ms": 60_000},
            "model": "some/tiny-model",
            "online": {
                "arrivals": {
                    "kind": "gamma",
                    "rate_per_s": 20,
                    "prompt": LENGTHS,
                    "output": LENGTHS,
                },
                "duration_s": 0.5,
            },
            "offline": {
                "in_flight": 2,
                "lead_s": 0.1,
                "backlog": {"kind": "random", "prompt": LENGTHS, "output": LENGTHS},
            },
            "systems": [
                {"name": "online-only", "kind": "stock", "load": "online"},
                {"name": "offline-only", "kind": "stock", "load": "offline"},
                {"name": "ours", "kind": "conserve", "conserve": {"offline": {}}},
            ],
        }

    def write(self) -> Path:
        path = self.folder / "bench.yaml"
        path.write_text(yaml.safe_dump(self.content))
        return path

    def run(self, **options: object) -> bool:
        return run_bench(self.write(), console=self.console, out=self.out, **options)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, fake_engine_path: Path) -> list[str]:
    """The systems whose servers were started, as fake engines; `broken` ones do not come up, and
    `mortal` ones die within the window.
    """
    names: list[str] = []

    def argv(_: BenchConfig, system: SystemConfig, _model: str, port: int) -> list[str]:
        names.append(system.name)
        port_text = "no-port" if system.name == "broken" else str(port)
        dies = ["12"] if system.name == "mortal" else []
        return [sys.executable, str(fake_engine_path), port_text, *dies]

    monkeypatch.setattr(BenchConfig, "server_argv", argv)
    return names


@pytest.fixture
def bench(tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A benchmark that begins at once, and whose pictures, a second or two each, are not drawn."""
    del started  # only there to be in place
    monkeypatch.setattr("conserve_sgl.bench.command.write_plots", lambda *_: ["a.png"])
    monkeypatch.setattr("conserve_sgl.bench.systems.benchmark._QUIET_LEAD_S", 0.05)
    return Bench(tmp_path)


def test_every_system_is_measured_under_its_load(bench: Bench, started: list[str]) -> None:
    bench.run()

    assert started == ["online-only", "offline-only", "ours"]
    systems = {system.name: system for system in by_system(read_folder(bench.out))}
    assert systems["online-only"].offline is None
    assert systems["offline-only"].online is None
    assert systems["offline-only"].offline.output_tokens > 0
    ours, base = systems["ours"], systems["online-only"]
    due = [[r.due_s for r in s.results[0].online] for s in (ours, base)]
    assert due[0] == due[1] != []
    assert ours.online.slo_attainment == 1.0
    assert ours.offline.input_tokens > 0
    assert base.idle_share == pytest.approx(0.5, abs=0.25)
    assert Harvest(list(systems.values())).efficiency(ours) > 0
    assert ours.counters["offline_preempted"] > 0


def test_everything_is_written(bench: Bench) -> None:
    bench.run(systems=["ours"])

    folder = bench.out / "runs" / "ours.1"
    assert yaml.safe_load((folder / "conserve.yaml").read_text()) == {"offline": {}}
    assert {path.name for path in folder.iterdir()} == {
        "conserve.yaml",
        "requests.jsonl",
        "run.json",
        "server.log",
    }
    written = {path.name for path in bench.out.iterdir()}
    assert written == {"requests.jsonl", "runs", "runs.jsonl", "table.md"}
    assert "tiny-model" in (bench.out / "table.md").read_text()
    assert "table.md, runs.jsonl, requests.jsonl, a.png" in bench.console.file.getvalue()


def test_only_conserve_gets_a_configuration(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_ENV, "/of/the/shell")
    bench.run(systems=["online-only", "ours"])

    env = {r.run.system.name: r.run.server_env[CONFIG_ENV] for r in read_folder(bench.out)}

    assert env["online-only"] == ""
    assert env["ours"] == str((bench.out / "runs" / "ours.1" / "conserve.yaml").resolve())


def test_an_emulated_device_is_measured_in_its_own_time(bench: Bench) -> None:
    bench.content["emulated"] = {"device": "some-gpu", "time_scale": 2}
    bench.content["systems"][2]["conserve"] = {"slo": {"ttft": "100ms"}}
    bench.run(systems=["online-only", "ours"])

    runs = {r.run.system.name: r.run for r in read_folder(bench.out)}
    for run in runs.values():
        assert run.server_env[DEVICE_ENV] == "some-gpu"
        assert run.server_env[SCALE_ENV] == "2"
        assert run.window_s == 0.5
        assert run.counters_after["arrival_ms.p99"] == 2.5 / 2
    told = yaml.safe_load((bench.out / "runs" / "ours.1" / "conserve.yaml").read_text())
    assert told["slo"]["ttft"] == "200.000000ms"
    (online,) = (r.online for r in read_folder(bench.out) if r.run.system.name == "ours")
    assert max(record.due_s for record in online) < 0.5
    assert all(record.sent_s >= record.due_s for record in online)
    assert "some-gpu, 2 times slower" in (bench.out / "table.md").read_text()


def test_a_server_on_an_emulated_device_is_turned_in_stretched_time(
    bench: Bench, started: list[str]
) -> None:
    bench.content["server"] = {"shared": True}
    bench.content["emulated"] = {"device": "some-gpu", "time_scale": 2}
    ours = bench.content["systems"][2]
    bench.content["systems"] = [
        {**ours, "name": name, "conserve": {"slo": {"tpot": tpot}}, "window_s": window_s}
        # The longest gap, which no dial turns, is 50 ms beside the first two.
        for name, tpot, window_s in (
            ("first", "10ms", 0.5),
            ("second", "20ms", 0.25),
            ("third", "40ms", 0.25),
        )
    ]

    bench.run()

    assert started == ["first", "third"]
    runs = {r.run.system.name: r for r in read_folder(bench.out)}
    sections = [
        yaml.safe_load((run_folder(bench.out, name, 1) / "conserve.yaml").read_text())["slo"]
        for name in started
    ]
    assert [section["tpot"] for section in sections] == ["20.000000ms", "80.000000ms"]
    assert [section["longest_gap"] for section in sections] == ["100.000000ms", "160.000000ms"]
    told = {name: runs["second"].run.counters_after[f"told.conserve_{name}"] for name in TOLD}
    assert told == TOLD
    assert runs["second"].run.window_s == 0.25
    assert {r.due_s for r in runs["second"].online} < {r.due_s for r in runs["first"].online}


TOLD = {"ttft_x": 2, "tpot_ms": 20, "yield_ms": 5}


def test_the_shell_s_emulated_device_is_not_the_benchmark_s(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEVICE_ENV, "of-the-shell")
    bench.run(systems=["online-only"])

    (result,) = read_folder(bench.out)
    assert result.run.server_env[DEVICE_ENV] == ""
    assert result.run.emulated is None
    assert result.run.host_share is None


def test_finished_runs_are_kept_and_the_others_made_up_for(
    bench: Bench, started: list[str]
) -> None:
    bench.content["systems"].pop(1)
    bench.run(systems=["ours"])
    bench.run(repeats=2)

    assert started == ["ours", "online-only", "online-only", "ours"]
    assert [r.run.repeat for r in read_folder(bench.out)] == [1, 1, 2, 2]


def test_runs_of_another_configuration_are_not_mixed_with_these(
    bench: Bench, started: list[str]
) -> None:
    bench.run(systems=["ours"])
    bench.content["seed"] = 2

    with pytest.raises(InputError, match="measured under another configuration"):
        bench.run()

    assert started == ["ours"]
    bench.run(systems=["ours"], fresh=True)
    assert [r.run.seed for r in read_folder(bench.out)] == [2]


def test_a_server_that_does_not_start_leaves_what_was_measured(bench: Bench) -> None:
    bench.content["systems"].append({"name": "broken", "kind": "stock"})

    with pytest.raises(ServerError, match="no-port"):
        bench.run(systems=["online-only", "broken"])

    assert [r.run.system.name for r in read_folder(bench.out)] == ["online-only"]


def test_a_server_that_dies_under_load_ends_the_benchmark_at_once(bench: Bench) -> None:
    bench.content["systems"] = [{"name": "mortal", "kind": "stock"}]
    bench.content["online"]["duration_s"] = 600.0  # the test's own time limit is shorter

    with pytest.raises(ServerError, match=r"(?s)ended with status 3.*out of memory"):
        bench.run()

    with pytest.raises(InputError, match="no finished run"):
        read_folder(bench.out)


def test_systems_that_start_alike_share_a_server(bench: Bench, started: list[str]) -> None:
    bench.content["server"] = {"shared": True, "step_log": True}
    ours = bench.content["systems"].pop()
    at = [{"slo": {"tpot": tpot, "yield_ms": 3}, "offline": {}} for tpot in ("25ms", "1.5x")]
    slow = {"slo": {"ttft_ms": 7, "tpot_ms": 8}, "window_s": 0.25}
    bench.content["systems"] += [
        {**ours, "conserve": at[0]},
        {**ours, "name": "slow", "conserve": at[1], **slow},
        {**ours, "name": "other", "conserve": {"memory": {"online_reserve": 0.5}}},
    ]

    bench.run()

    assert started == ["online-only", "ours", "other"]
    runs = {r.run.system.name: r for r in read_folder(bench.out)}
    assert "told.conserve_tpot_x" not in runs["ours"].run.counters_before
    assert runs["slow"].run.counters_before["told.conserve_tpot_x"] == 1.5
    assert runs["slow"].run.counters_before["told.conserve_yield_ms"] == 3
    assert (runs["slow"].run.slo.ttft_ms, runs["ours"].run.slo.ttft_ms) == (7, 60_000)
    assert runs["slow"].run.window_s == 0.25
    assert {r.due_s for r in runs["slow"].online} < {r.due_s for r in runs["ours"].online}
    logs = {name: run_folder(bench.out, name, 1) / "server.log" for name in runs}
    assert "caches emptied" not in logs["online-only"].read_text()
    assert logs["offline-only"].read_text().startswith("caches emptied")
    steps = {name: (log.parent / "steps.jsonl").read_text() for name, log in logs.items()}
    assert [name for name, text in steps.items() if text] == ["online-only", "ours", "other"]


def test_what_would_not_end_in_time_is_not_begun(bench: Bench, started: list[str]) -> None:
    bench.content["online"]["duration_s"] = 600.0  # the test's own time limit is shorter
    for system in (0, 2):
        bench.content["systems"][system]["window_s"] = 0.5

    assert not bench.run(time_limit_s=300.0)

    assert started == ["online-only", "ours"]
    assert "No time was left for offline-only" in bench.console.file.getvalue()
    assert not bench.run(time_limit_s=0.0, fresh=True)
    assert started == ["online-only", "ours"]
    assert bench.run(systems=["ours"])


BENCH_IN_A_PROCESS = """
import sys
from pathlib import Path
from rich.console import Console
from conserve_sgl.bench.command import run_bench
from conserve_sgl.bench.systems.config import BenchConfig
folder, engine = map(Path, sys.argv[1:])
BenchConfig.server_argv = lambda _, system, model, port: [
    sys.executable, str(engine), str(port), "1000000", str(folder)]
run_bench(folder / "bench.yaml", console=Console(), out=folder / "out")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_running(
    bench: Bench, fake_engine_path: Path, number: signal.Signals
) -> None:
    bench.content["online"]["duration_s"] = 600.0
    bench.write()
    argv = [sys.executable, "-c", BENCH_IN_A_PROCESS, str(bench.folder), str(fake_engine_path)]
    log = bench.out / "runs" / "online-only.1" / "server.log"

    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (log.exists() and "Running on" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=120)

    assert process.returncode != 0
    assert not any(str(bench.folder) in command for command in running_commands())
    assert not (log.parent / "run.json").exists()


def running_commands() -> Iterator[str]:
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield entry.read_text(errors="replace")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("model"), "names no model"),
        (lambda c: c["offline"].update(backlog=JSONL), "cannot be read"),
        (lambda c: c["systems"][2].update(conserve={"x": 1}), r"systems\[2\]\.conserve\.x"),
    ],
)
def test_bad_input_is_refused_before_a_server_starts(
    bench: Bench, started: list[str], change: Callable[[dict], object], reason: str
) -> None:
    change(bench.content)

    with pytest.raises(InputError, match=reason):
        bench.run()

    assert started == []
    assert not bench.out.exists()


JSONL = {"kind": "jsonl", "path": "none.jsonl", "field": "q", "max_tokens": 3}


def test_a_duration_and_flags_may_be_given(bench: Bench) -> None:
    bench.run(systems=["online-only"], duration_s=0.3, flags=["--dtype=float32"])

    (result,) = read_folder(bench.out)
    assert result.run.window_s == 0.3


def test_two_folders_are_compared(bench: Bench) -> None:
    bench.run(systems=["ours"])

    assert "| ours | SLO met | 100 % | 100 % | 1.00x |" in compare_folders(bench.out, bench.out)
