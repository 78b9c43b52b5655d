"""The whole demo against a fake engine and a fake job, as a person would run it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conserve_sgl.bench.systems.server import free_port

JOB = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
print("job for", sys.argv[2], flush=True)
try:
    while True:
        time.sleep(0.05)
        line = {"id": "0", "done_unix_s": time.time(), "latency_s": 0.05, "prompt_tokens": 40,
                "cached_tokens": 10, "completion_tokens": 5}
        with (out / "a.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
except KeyboardInterrupt:
    print("stopped in good order", flush=True)
    sys.exit(130)
"""


class Run:
    """A demo in `folder`, with the given parts of its configuration replaced."""

    def __init__(self, folder: Path, engine: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "job.py").write_text(JOB)
        lengths = {"median_tokens": 5, "max_tokens": 5}
        self.config = {
            "seed": 1,
            "slo": {"ttft_ms": 60_000, "tpot_ms": 60_000},
            "server": {
                "command": ["{python}", str(engine), "{port}", "{out} is the server's"],
                "warmup_requests": 2,
            },
            "online": {
                "arrivals": {
                    "kind": "gamma",
                    "rate_per_s": 20,
                    "prompt": lengths,
                    "output": lengths,
                },
                "duration_s": 1.0,
            },
            "offline": {
                "command": ["{python}", str(folder / "job.py"), "{out}/job", "{url}"],
                "output": "{out}/job",
                "lead_s": 0.2,
            },
        }

    def start(self, *options: str) -> subprocess.Popen[str]:
        path = self.folder / "demo.yaml"
        path.write_text(yaml.safe_dump(self.config))
        argv = [sys.executable, "-m", "conserve_sgl.bench.demo", "--model", "some/tiny-model"]
        return subprocess.Popen(
            [*argv, "--config", str(path), "--out", str(self.out), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, *options: str) -> tuple[int, str, str]:
        with self.start(*options) as process:
            output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors


@pytest.fixture
def demo(tmp_path: Path, fake_engine_path: Path) -> Run:
    return Run(tmp_path, fake_engine_path)


def processes_that_mention(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and text in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def test_the_demo_measures_both_phases_and_writes_its_results(demo: Run) -> None:
    status, output, errors = demo.finish()

    assert status == 0, errors
    assert "online beside the job" in output
    assert (demo.out / "demo.png").stat().st_size > 10_000
    assert "tiny-model" in (demo.out / "table.md").read_text()
    report = json.loads((demo.out / "demo.json").read_text())
    alone, beside = report["phases"]
    assert [r["due_s"] for r in alone["online"]] == [r["due_s"] for r in beside["online"]]
    assert all(r["error"] is None for r in alone["online"] + beside["online"])
    assert report["summaries"]["online alone"]["offline"] is None
    assert report["summaries"]["online beside the job"]["offline"]["output_tokens"] > 0
    assert report["config"]["seed"] == 1
    assert "sglang" in report["environment"]["versions"]
    for line in ("Starting the server (log: ", "online alone: ", "online beside the job: "):
        assert line in errors  # no terminal, so no bars
    assert "missed an objective" not in errors + output
    job_log = (demo.out / "job.log").read_text()
    assert "job for http://127.0.0.1:" in job_log
    assert "stopped in good order" in job_log


def test_objectives_that_are_missed_without_the_job_are_said_before_and_below_the_table(
    demo: Run,
) -> None:
    demo.config["slo"]["ttft_ms"] = 0.001

    status, output, errors = demo.finish()

    assert status == 0, errors
    warning = "online requests missed an objective with no offline work"
    before, table, after = (text.replace("\n", " ") for text in split_at_table(output, errors))
    assert warning in before
    assert warning in after
    assert "online beside the job" in table
    assert warning in (demo.out / "table.md").read_text()


def split_at_table(output: str, errors: str) -> tuple[str, str, str]:
    before, _, after = errors.partition("Arrival to scheduler")
    return before, output, after


def test_the_server_gets_the_port_asked_for_and_a_profile_folder_of_its_own(demo: Run) -> None:
    show = "import os, sys; sys.exit(sys.argv[1] + ' ' + os.environ['CONSERVE_PROFILE_DIR'])"
    demo.config["server"]["command"] = ["{python}", "-c", show, "{port}"]
    port = free_port()
    status, _, errors = demo.finish("--port", str(port))
    assert status == 2
    assert f"{port} {demo.out / 'profiles'}" in errors.replace("\n", "")


def test_a_port_that_is_taken_is_refused_before_anything_starts(demo: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, errors = demo.finish("--port", str(taken.getsockname()[1]))
    assert status == 2
    assert "cannot be had: Address already in use" in errors
    assert not (demo.out / "server.log").exists()


def wait_for(path: Path, text: str) -> None:
    """Until `path` holds `text`; the test's own time limit ends a wait in vain."""
    while not path.exists() or text not in path.read_text():
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_stream_leaves_nothing_running(
    demo: Run, number: signal.Signals
) -> None:
    demo.config["online"]["duration_s"] = 600.0

    with demo.start() as process:
        wait_for(demo.out / "server.log", "Running on")
        assert processes_that_mention(f"{demo.out} is the server's")
        os.kill(process.pid, number)
        process.communicate(timeout=120)

    assert process.returncode != 0
    assert processes_that_mention(str(demo.folder)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_beside_the_job_stops_the_job_in_good_order(
    demo: Run, number: signal.Signals
) -> None:
    demo.config["offline"]["lead_s"] = 600.0

    with demo.start() as process:
        wait_for(demo.out / "job.log", "job for")
        os.kill(process.pid, number)
        process.communicate(timeout=120)

    assert process.returncode != 0
    assert "stopped in good order" in (demo.out / "job.log").read_text()
    assert processes_that_mention(str(demo.folder)) == []


def test_a_job_that_fails_ends_the_demo_with_its_log(demo: Run) -> None:
    demo.config["offline"]["command"] = ["{python}", "-c", "raise SystemExit('no such task')"]

    status, _, errors = demo.finish()

    assert status == 2
    assert "the job ended with status 1" in errors
    assert "no such task" in errors


def test_a_server_that_dies_ends_the_demo_with_its_log(demo: Run) -> None:
    demo.config["server"]["command"] = ["{python}", "-c", "raise SystemExit('no such flag')"]

    status, _, errors = demo.finish()

    assert status == 2
    assert "no such flag" in errors


def test_a_wrong_configuration_is_refused_before_anything_starts(demo: Run) -> None:
    del demo.config["slo"]["ttft_ms"]

    status, _, errors = demo.finish()

    assert status == 2
    assert "demo.yaml" in errors
    assert "ttft_ms" in errors
    assert not (demo.out / "server.log").exists()
