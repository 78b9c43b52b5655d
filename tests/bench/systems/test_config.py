"""Benchmark files: the shipped ones, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conserve_sgl.bench.systems.config import BenchConfig, load_bench, offline_headers
from conserve_sgl.errors import InputError

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "bench"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("demo"))

COMPARED_DIRECTLY = ("cpu-ablation", "cpu-burst", "cpu-kv")
"""Files whose systems do the same offline work, or none."""

LENGTHS = {"median_tokens": 5, "max_tokens": 5}
SMALL = {
    "seed": 1,
    "slo": {"ttft_ms": 500, "tpot_ms": 50},
    "server": {"flags": ["--common"], "env": {"EVERYWHERE": "1"}},
    "online": {
        "arrivals": {"kind": "gamma", "rate_per_s": 5, "prompt": LENGTHS, "output": LENGTHS},
        "duration_s": 1,
    },
    "offline": {
        "in_flight": 2,
        "backlog": {"kind": "random", "prompt": LENGTHS, "output": LENGTHS},
    },
    "systems": [
        {"name": "plain", "kind": "stock", "load": "online"},
        {"name": "ours", "kind": "conserve", "flags": ["--own"], "conserve": {}},
    ],
}

Load = Callable[..., BenchConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads SMALL with top-level keys replaced."""

    def load_small(**changes: object) -> BenchConfig:
        path = tmp_path / "bench.yaml"
        path.write_text(yaml.safe_dump({**SMALL, **changes}))
        return load_bench(path)

    return load_small


@pytest.fixture
def _data(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSERVE_BENCH_DATA", str(shared_data))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.usefixtures("_data")
def test_every_shipped_file_loads_and_has_a_stream(path: Path) -> None:
    config = load_bench(path)

    arrivals = config.online.arrivals.draw(config.online.duration_s, config.seed)

    assert len(arrivals) >= config.server.warmup_requests
    assert next(config.offline.backlog.bodies([config.seed], {}))
    assert any(system.is_online_baseline for system in config.systems)
    # Without it there is no harvest efficiency.
    has_ceiling = any(system.is_offline_ceiling for system in config.systems)
    assert has_ceiling == (path.stem not in COMPARED_DIRECTLY)


@pytest.mark.parametrize("name", ["cpu", "h100-llama8b", "h100-qwen7b"])
@pytest.mark.usefixtures("_data")
def test_the_full_files_hold_every_system(name: str) -> None:
    config = load_bench(FOLDER / f"{name}.yaml")

    assert {
        "online-only",
        "offline-only",
        "stock",
        "stock-priority",
        "stock-priority-mixed",
        "stock-priority-hicache",
        "conserve",
        "conserve-online-only",
        "offline-first",
    } <= {system.name for system in config.systems}


@pytest.mark.usefixtures("_data")
def test_the_quick_file_is_the_full_one_cut_short() -> None:
    full, quick = (load_bench(FOLDER / f"{name}.yaml") for name in ("cpu", "cpu-quick"))

    assert quick.online.arrivals == full.online.arrivals
    assert quick.server == full.server
    assert quick.offline.backlog == full.offline.backlog
    own = {system.name: system for system in full.systems}
    assert all(system == own[system.name] for system in quick.systems)


def test_systems_share_the_common_flags_and_add_their_own(load: Load) -> None:
    config = load()
    plain, ours = (config.server_argv(system, "some-model", 80) for system in config.systems)

    assert ours == [*plain, "--own"]
    assert "--common" in plain
    assert plain[plain.index("--model-path") + 1] == "some-model"


def test_offline_requests_to_conserve_carry_its_header(load: Load) -> None:
    plain, ours = load().systems

    assert offline_headers(plain) == {}
    assert offline_headers(ours) == {"x-sgl-conserve-class": "offline"}


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"no_such_section": 1}, "systems[0].conserve.no_such_section"),
        ({"memory": {"online_reserve": 7}}, "systems[0].conserve.memory.online_reserve"),
    ],
)
def test_a_bad_conserve_section_is_refused_with_file_line_and_key(
    load: Load, section: dict, key: str
) -> None:
    with pytest.raises(InputError) as refused:
        load(systems=[{"name": "a", "kind": "conserve", "conserve": section}])

    assert refused.value.path.name == "bench.yaml"
    assert refused.value.key == key
    assert refused.value.line > 1


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ({"name": "a", "kind": "stock", "conserve": {}}, "takes no conserve section"),
        ({"name": "a b", "kind": "stock"}, "text that matches"),
        ({"name": "a", "kind": "vanilla"}, "must be conserve or stock"),
        ({"name": "a", "kind": "stock", "falgs": []}, "unknown key"),
    ],
)
def test_a_system_that_makes_no_sense_is_refused(load: Load, system: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load(systems=[system])


def test_two_systems_of_one_name_are_refused(load: Load) -> None:
    with pytest.raises(InputError, match="two systems are named a"):
        load(systems=[{"name": "a", "kind": "stock"}] * 2)


def test_systems_are_chosen_by_name_in_the_order_of_the_file(load: Load) -> None:
    assert [s.name for s in load().only(["ours", "plain"]).systems] == ["plain", "ours"]
    with pytest.raises(ValueError, match="no system is named theirs; there are plain, ours"):
        load().only(["theirs"])


def azure(path: str) -> dict:
    arrivals = {"kind": "azure", "path": path, "max_prompt_tokens": 9, "max_output_tokens": 9}
    return {"arrivals": arrivals, "duration_s": 1}


def test_a_path_is_relative_to_the_file_and_may_hold_variables(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSERVE_BENCH_DATA", "/data")

    assert load(online=azure("a.csv")).online.arrivals.path == str(tmp_path / "a.csv")
    assert load(online=azure("$CONSERVE_BENCH_DATA/a")).online.arrivals.path == "/data/a"
    given = load_bench(tmp_path / "bench.yaml", trace=Path("b.csv"))
    assert given.online.arrivals.path == "b.csv"


def test_a_variable_that_is_not_set_is_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONSERVE_BENCH_DATA", raising=False)
    with pytest.raises(InputError, match="CONSERVE_BENCH_DATA/a: set that variable"):
        load(online=azure("$CONSERVE_BENCH_DATA/a"))


def test_a_trace_cannot_stand_for_a_distribution(load: Load, tmp_path: Path) -> None:
    load()
    with pytest.raises(InputError, match="not a trace"):
        load_bench(tmp_path / "bench.yaml", trace=Path("b.csv"))


def test_the_first_run_on_an_h100_is_emulated_with_its_own_load(shared_data: Path) -> None:
    there = yaml.safe_load((shared_data / "h100" / "bench.yaml").read_text())
    here = yaml.safe_load((FOLDER / "h100-emulated.yaml").read_text())

    assert {key: here[key] for key in ("seed", "slo", "online", "offline")} == {
        key: there[key] for key in ("seed", "slo", "online", "offline")
    }
    ran = {system["name"]: system for system in there["systems"]}
    assert all(system == ran[system["name"]] for system in here["systems"])


def test_an_emulated_device_is_named_or_a_file_beside_this_one(load: Load, tmp_path: Path) -> None:
    named = load(emulated={"device": "h100-llama8b-triton"})
    beside = load(emulated={"device": "gpus/mine.json", "time_scale": 3})

    assert named.emulated.device == "h100-llama8b-triton"
    assert (named.time_scale, beside.time_scale, load().time_scale) == (1.0, 3.0, 1.0)
    assert beside.emulated.device == str((tmp_path / "gpus" / "mine.json").resolve())


@pytest.mark.parametrize(
    ("emulated", "key"),
    [
        ({"device": "x", "time_scale": 0.5}, "emulated.time_scale"),
        ({"device": ""}, "emulated.device"),
        ({"device": "x", "speed": 1}, "emulated.speed"),
    ],
)
def test_an_emulated_device_that_cannot_be_is_refused(
    load: Load, emulated: dict[str, object], key: str
) -> None:
    with pytest.raises(InputError, match=key):
        load(emulated=emulated)
