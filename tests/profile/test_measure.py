"""Which steps of an engine are run for its profile, what of them counts, and where it goes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from conserve_sgl.policy.latency import StepKind, StepSample
from conserve_sgl.profile import DIR_ENV, EngineIdentity, Profile, ProfileStore
from conserve_sgl.profile.measure import RunShape, load_or_measure, measure, write_grid
from conserve_sgl.profile.plan import ProfileLimits, StepShape, plan_grid, plan_profile
from conserve_sgl.profile.steps import GRID_ENV, read_steps
from support.profiles import IDENTITY

LIMITS = ProfileLimits(chunk_tokens=512, context_tokens=4096, pool_tokens=100_000, rows=32)


class Engine:
    """An engine without steps of its own: each of three takes what `seconds` says."""

    def __init__(
        self, *, is_first_rank: bool = True, seconds: Sequence[float] = (0.01, 0.03, 0.02)
    ) -> None:
        self.is_first_rank = is_first_rank
        self.seconds = seconds
        self.shapes: list[StepShape] = []
        self.is_stepping = False

    @property
    def identity(self) -> EngineIdentity:
        return IDENTITY

    @property
    def limits(self) -> ProfileLimits:
        return LIMITS

    @property
    def layers(self) -> int:
        return 4

    def from_rank_zero(self, make):
        return make()

    @contextmanager
    def stepping(self) -> Iterator[RunShape]:
        self.is_stepping = True
        yield self.run
        self.is_stepping = False

    def run(self, shape: StepShape) -> list[StepSample]:
        assert self.is_stepping
        self.shapes.append(shape)
        return [StepSample(shape.work, seconds) for seconds in self.seconds]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProfileStore:
    monkeypatch.setenv(DIR_ENV, str(tmp_path / "profiles"))
    monkeypatch.delenv(GRID_ENV, raising=False)
    return ProfileStore(tmp_path / "profiles")


def measured(counts: Counter[str]) -> tuple[int, int]:
    return counts["profiles_measured"], counts["profiles_rejected"]


def test_every_shape_of_the_plan_counts_with_its_median_after_steps_that_do_not():
    engine = Engine()
    plan = plan_profile(LIMITS)

    samples = measure(engine, time_limit_s=600.0)

    assert [sample.work for sample in samples] == [shape.work for shape in plan]
    assert {sample.seconds for sample in samples} == {0.02}
    assert engine.shapes[-len(plan) :] == plan
    warm_up = engine.shapes[: -len(plan)]
    assert {shape.work.kind for shape in warm_up} == set(StepKind)
    assert not engine.is_stepping


def test_it_stops_at_its_time_limit_with_the_least_that_a_model_needs(caplog):
    with caplog.at_level(logging.WARNING):
        samples = measure(Engine(), time_limit_s=-1.0)

    assert len(samples) == 12
    assert f"with 12 of {len(plan_profile(LIMITS))} steps measured" in caplog.text


def test_rank_zero_decides_when_to_stop():
    class Other(Engine):
        def from_rank_zero(self, make):
            made = make()
            return False if made is True else made  # rank 0 is not late

    assert len(measure(Other(), time_limit_s=-1.0)) == len(plan_profile(LIMITS))


def test_an_engine_is_measured_once(store: ProfileStore):
    counts: Counter[str] = Counter()
    first = load_or_measure(Engine(), counts)
    assert measured(counts) == (1, 0)
    profile = store.load(IDENTITY)
    assert profile is not None
    assert profile.layers == 4

    again = Engine()
    model = load_or_measure(again, counts)

    assert measured(counts) == (1, 0)
    assert again.shapes == []
    work = profile.samples[0].work
    assert model.predict_s(work) == first.predict_s(work)


def test_a_stored_profile_that_cannot_be_used_is_measured_again_and_replaced(
    store: ProfileStore, caplog
):
    store.folder.mkdir()
    store.path_of(IDENTITY).write_text("no profile")
    counts: Counter[str] = Counter()

    load_or_measure(Engine(), counts)

    assert measured(counts) == (1, 1)
    assert "cannot be used, measuring again" in caplog.text
    assert isinstance(store.load(IDENTITY), Profile)


def test_a_folder_that_cannot_be_written_costs_the_next_start_alone(store: ProfileStore, caplog):
    store.folder.write_text("a file is in the way")

    load_or_measure(Engine())

    assert "cannot be stored" in caplog.text


def test_other_ranks_write_nothing(store: ProfileStore, tmp_path: Path):
    load_or_measure(Engine(is_first_rank=False))
    write_grid(Engine(is_first_rank=False), str(tmp_path / "grid.jsonl"))

    assert not store.folder.exists()
    assert not (tmp_path / "grid.jsonl").exists()


def test_a_grid_keeps_every_step(store: ProfileStore, tmp_path: Path, monkeypatch):  # noqa: ARG001
    monkeypatch.setenv(GRID_ENV, str(tmp_path / "grid.jsonl"))

    load_or_measure(Engine())

    steps = read_steps(tmp_path / "grid.jsonl")
    works = [shape.work for shape in plan_grid(LIMITS) for _ in range(3)]
    assert [step.work for step in steps] == works
    assert [step.seconds for step in steps[:3]] == [0.01, 0.03, 0.02]
