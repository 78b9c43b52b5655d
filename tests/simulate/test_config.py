from __future__ import annotations

from pathlib import Path

import pytest

from conserve_sgl.config import SloConfig
from conserve_sgl.errors import InputError
from conserve_sgl.simulate.config import Simulation, load_simulation
from conserve_sgl.simulate.flags import ServerFlags
from conserve_sgl.simulate.stock import Limits, StockOptions

SMALL = """\
seed: 3
device: h100-llama8b-fa3
slo: {ttft: 300ms, tpot: 20ms}
conserve:
  memory: {online_reserve: 0.1}
server:
  flags: [--max-total-tokens=50000, --max-running-requests=64, --load-format=dummy]
online:
  arrivals:
    kind: gamma
    rate_per_s: 2
    prompt: {median_tokens: 200, max_tokens: 200}
    output: {median_tokens: 30, max_tokens: 30}
  duration_s: 4
offline:
  in_flight: 16
  lead_s: 1
  backlog:
    kind: random
    prompt: {median_tokens: 300, max_tokens: 300}
    output: {median_tokens: 20, max_tokens: 20}
dial:
  - {tpot: 15ms}
  - {ttft: 200ms, tpot: 30ms}
systems:
  - name: online-only
    kind: stock
    load: online
  - name: first-come
    kind: stock
    flags: [--enable-mixed-chunk, --chunked-prefill-size=512]
  - name: conserve
    kind: conserve
    flags: [--enable-hierarchical-cache]
  - name: tight
    kind: conserve
    conserve: {slo: {tpot: 1.25x}, memory: {online_reserve: 0.3}}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def names(simulation: Simulation) -> list[str]:
    return [run.system.name for run in simulation.runs]


def test_the_baselines_come_first_and_the_dial_last(small):
    simulation = load_simulation(small)
    # online-only is in the file, offline-only is not: results are shares of both.
    assert names(simulation) == [
        "online-only",
        "offline-only",
        "first-come",
        "conserve",
        "tight",
        "conserve-15ms",
        "conserve-200ms-30ms",
    ]
    assert simulation.flags.limits == Limits(kv_tokens=50_000, rows=64)


def test_a_system_is_held_to_its_own_objectives_over_those_of_all(small):
    runs = {run.system.name: run for run in load_simulation(small).runs}
    assert runs["first-come"].conserve is None
    assert runs["first-come"].slo == runs["conserve"].slo == SloConfig(ttft="300ms", tpot="20ms")
    assert runs["tight"].slo == SloConfig(ttft="300ms", tpot="1.25x")
    assert runs["conserve-200ms-30ms"].conserve.slo == SloConfig(ttft="200ms", tpot="30ms")
    assert runs["conserve"].conserve.memory.online_reserve == 0.1
    assert runs["tight"].conserve.memory.online_reserve == 0.3
    assert runs["conserve"].flags.hicache
    assert not runs["tight"].flags.hicache
    assert runs["first-come"].flags.limits.chunk_tokens == 512


def test_a_configuration_of_conserve_stands_for_the_files_section(small, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("slo: {ttft: 1s, tpot: 40ms}")
    with pytest.raises(InputError, match=r"mine\.yaml:1: slo"):
        load_simulation(small, conserve=mine)
    mine.write_text("slo: {ttft: 900ms, tpot: 40ms}")
    runs = {run.system.name: run for run in load_simulation(small, conserve=mine).runs}
    assert runs["conserve"].slo == SloConfig(ttft="900ms", tpot="40ms")
    assert runs["conserve"].conserve.memory.online_reserve == 0.25
    assert runs["online-only"].slo == runs["conserve"].slo


def test_changes_stand_for_keys_of_the_file(small):
    simulation = load_simulation(
        small,
        changes={"slo.tpot": "12ms", "offline.in_flight": "8", "host.step_s": "0.002"},
        duration_s=2.5,
        systems=["conserve"],
        device="h100-llama8b-triton",
    )
    assert simulation.runs[0].slo.tpot == "12ms"
    assert simulation.offline.in_flight == 8
    assert simulation.host.step_s == 0.002
    assert simulation.online.duration_s == 2.5
    assert simulation.device.backend == "triton"
    assert names(simulation)[:3] == ["online-only", "offline-only", "conserve"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slo.tpt": "9ms"}, r"^slo\.tpt=9ms: unknown key"),
        ({"slo.tpot": "9"}, r"^slo\.tpot=9: "),
        ({"slo.tpot": "fast"}, r"^slo\.tpot=fast: slo: tpot: 'fast' is not an objective"),
        ({"seed.x": "1"}, r"^seed\.x=1: there is no such key"),
        ({"seed": "[1"}, r"^seed=\[1: the value is not YAML"),
        ({"offline.in_flight": "0"}, r"^offline\.in_flight=0: "),
    ],
)
def test_a_bad_change_is_named(small, changes, reason):
    with pytest.raises(InputError, match=reason):
        load_simulation(small, changes=changes)


@pytest.mark.parametrize(
    ("was", "becomes", "fault"),
    [
        ("seed: 3", "sed: 3", r"small\.yaml:1: sed: unknown key"),
        ("tpot: 20ms}", "tpot: 20}", r"small\.yaml:3: slo\.tpot: "),
        ("device: h100-llama8b-fa3", "device: b300", "b300: is no device; there are"),
        ("in_flight: 16", "in_flight: no", r"small\.yaml:16: offline\.in_flight"),
        ("- name: tight", "- name: conserve", "two systems are named conserve"),
        ("--enable-mixed-chunk", "--enable-magic", r"systems\[1\]\.flags: .*--enable-magic"),
        ("=512", "=many", r"systems\[1\]\.flags: .*--chunked-prefill-size"),
        ("online_reserve: 0.3", "online_reserve: 3", r"systems\[3\]\.conserve: .*online_reserve"),
        ("{tpot: 15ms}", "{tpot: 0.5x}", r"dial\[0\]: "),
        ("kind: random", "kind: jsonl", "offline.backlog"),
    ],
)
def test_a_bad_file_is_named_with_its_key(small, was, becomes, fault):
    assert was in SMALL
    small.write_text(SMALL.replace(was, becomes, 1))
    with pytest.raises(InputError, match=fault):
        load_simulation(small)


def test_a_backlog_without_lengths_is_refused(small):
    backlog = SMALL[SMALL.index("    kind: random") : SMALL.index("dial:")]
    small.write_text(
        SMALL.replace(backlog, "    {kind: jsonl, path: a, field: q, max_tokens: 9}\n")
    )
    with pytest.raises(InputError, match=r"offline\.backlog: the simulator needs lengths"):
        load_simulation(small)


def test_an_unknown_system_is_told_with_those_that_there_are(small):
    with pytest.raises(InputError, match="no system is named best; there are online-only, first"):
        load_simulation(small, systems=["best"])


def test_a_trace_stands_only_for_a_trace(small, tmp_path):
    with pytest.raises(InputError, match=r"online\.arrivals: is not a trace"):
        load_simulation(small, trace=tmp_path / "a.csv")


def test_the_shipped_simulation_is_read(checkout, monkeypatch):
    monkeypatch.setenv("CONSERVE_BENCH_DATA", "/nowhere")
    simulation = load_simulation(checkout / "configs" / "simulate" / "h100-llama8b.yaml")
    assert {"stock-priority", "conserve", "conserve-tight"} <= set(names(simulation))
    assert sum(run.on_dial for run in simulation.runs) == 6
    priority = next(r for r in simulation.runs if r.system.name == "stock-priority")
    assert priority.flags.options.priority


def test_flags_are_those_of_a_server():
    flags = ServerFlags.of(
        [
            "--enable-priority-scheduling",
            "--prefill-decode-interval",
            "8",
            "--prefill-decode-interval-min-bs=4",
            "--retraction-policy=priority",
            "--disable-overlap-schedule",
            "--hicache-ratio=2",
            "--max-running-requests=9",
            "--max-running-requests=7",
        ]
    )
    assert flags.options == StockOptions(
        priority=True,
        prefill_decode_interval=8,
        prefill_decode_interval_min_bs=4,
        retract_offline_first=True,
    )
    assert not flags.overlap
    assert not flags.hicache
    assert flags.limits.rows == 7


@pytest.mark.parametrize(
    "flag", ["--speculative-algorithm=EAGLE", "--max-total-tokens=0", "--chunked-prefill-size=-1"]
)
def test_flags_that_it_cannot_follow_are_refused(flag):
    with pytest.raises(ValueError, match=flag.partition("=")[0]):
        ServerFlags.of([flag])
