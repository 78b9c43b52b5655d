"""Measures an engine's own steps at its start, and gives the latency model fitted to them.

Here stands which steps are run and for how long, what of them counts, and where it is kept. How a
step is run, and what the engine is, its process says (`engine/profiling.py`).

`CONSERVE_PROFILE_GRID=FILE` has a denser grid of steps measured after that, every one of them
written to FILE as a step log: what a simulated device is made of (docs/simulate.md).
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from datetime import UTC, datetime
from itertools import chain
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import track

from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import LatencyModel, StepKind, StepSample
from conserve_sgl.profile.plan import ProfileLimits, StepShape, plan_grid, plan_profile
from conserve_sgl.profile.steps import GRID_ENV, StepLog
from conserve_sgl.profile.store import EngineIdentity, Profile, ProfileStore

__all__ = ["TIME_LIMIT_S", "MeasuredEngine", "RunShape", "load_or_measure", "measure", "write_grid"]

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 20.0
"""When a profile stops, finished or not: a start must not wait long for a slow machine."""

_LEAST_SHAPES = 12
_LOG_EVERY_S = 5.0
_GRID_LIMIT_S = 120.0

T = TypeVar("T")
RunShape = Callable[[StepShape], Sequence[StepSample]]
"""Runs the steps of a shape; a sample for each of them that counts, at least one."""


class MeasuredEngine(Protocol):
    """An idle engine whose steps can be measured. Each tensor-parallel rank has its own, and runs
    the same steps; rank 0 keeps the time, the file and the decision when to stop.
    """

    @property
    def identity(self) -> EngineIdentity:
        """What its step times depend on."""

    @property
    def limits(self) -> ProfileLimits:
        """What one step of it can hold."""

    @property
    def layers(self) -> int:
        """Decoder layers of its model."""

    @property
    def is_first_rank(self) -> bool:
        """Whether this process is rank 0."""

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """What `make()` gives on rank 0, on every rank; only rank 0 calls it."""

    def stepping(self) -> AbstractContextManager[RunShape]:
        """Within it steps can be run, by what it gives; after it the engine is as it was."""


def load_or_measure(engine: MeasuredEngine, counts: Counter[str] | None = None) -> LatencyModel:
    """The latency model of an engine: from its stored profile, or measured now and stored.

    Every rank calls it; every rank gets the same model. A stored file that cannot be used is
    logged and measured again, and a folder that cannot be written costs only the next start.
    `counts` gets `profiles_measured` and `profiles_rejected`.
    """
    counts = Counter() if counts is None else counts
    counts.update(profiles_measured=0, profiles_rejected=0)
    identity, store = engine.identity, ProfileStore.of_environment()
    profile = engine.from_rank_zero(lambda: _load(store, identity, counts))
    if profile is None:
        profile = Profile(
            identity=identity,
            samples=measure(engine),
            measured_at=datetime.now(UTC),
            layers=engine.layers,
        )
        counts["profiles_measured"] += 1
        if engine.is_first_rank:
            _save(store, profile)
    model = profile.model()
    _log_fit(model)
    if path := os.environ.get(GRID_ENV):
        write_grid(engine, path)
    return model


def _load(store: ProfileStore, identity: EngineIdentity, counts: Counter[str]) -> Profile | None:
    try:
        profile = store.load(identity)
    except InputError as e:
        counts["profiles_rejected"] += 1
        logger.warning("a stored latency profile cannot be used, measuring again: %s", e)
        return None
    if profile is not None:
        logger.info("latency profile of %s: %s", profile.measured_at, store.path_of(identity))
    return profile


def _save(store: ProfileStore, profile: Profile) -> None:
    try:
        logger.info("latency profile stored: %s", store.save(profile))
    except OSError as e:
        logger.warning(
            "the latency profile cannot be stored in %s (%s); the next start measures again",
            store.folder,
            e.strerror,
        )


def _log_fit(model: LatencyModel) -> None:
    for kind in StepKind:
        if (errors := model.errors(kind)).steps:
            logger.info(
                "latency model, %s steps: median error %.1f%%, P95 %.1f%%, over %d",
                kind.name.lower(),
                errors.median * 100,
                errors.p95 * 100,
                errors.steps,
            )


def measure(engine: MeasuredEngine, time_limit_s: float = TIME_LIMIT_S) -> tuple[StepSample, ...]:
    """Run the steps of a profile on an idle engine, and leave it as it was.

    Returns:
        At least one sample of a prefill and one of a decode step, the same on every rank.
    """
    samples = _measured(engine, plan_profile(engine.limits), time_limit_s)
    return engine.from_rank_zero(lambda: tuple(map(_median, samples)))


def write_grid(engine: MeasuredEngine, path: str) -> None:
    """Run the steps of `plan_grid` on an idle engine and append each of them to a step log.

    Raises:
        InputError: the file cannot be written.
    """
    samples = _measured(engine, plan_grid(engine.limits), _GRID_LIMIT_S)
    if not engine.is_first_rank:
        return
    with closing(StepLog.to(path)) as log:
        for sample in chain.from_iterable(samples):
            log.write(sample)
    logger.info("a grid of %d shapes of steps: %s", len(samples), path)


def _measured(
    engine: MeasuredEngine, plan: list[StepShape], time_limit_s: float
) -> list[Sequence[StepSample]]:
    """The samples of each shape of `plan` that there was time for."""
    samples: list[Sequence[StepSample]] = []
    with engine.stepping() as run:
        for shape in _warm_up(plan):
            run(shape)
        started_s = time.perf_counter()
        for n, shape in enumerate(_with_progress(engine, plan, time_limit_s)):
            late = time.perf_counter() - started_s > time_limit_s
            if n >= _LEAST_SHAPES and engine.from_rank_zero(lambda late=late: late):
                logger.warning(
                    "the latency profile stops after %.0f s, with %d of %d steps measured",
                    time_limit_s,
                    n,
                    len(plan),
                )
                break
            samples.append(run(shape))
    return samples


def _median(samples: Sequence[StepSample]) -> StepSample:
    """The sample in the middle, of several of one shape: rows of a decode step grow meanwhile."""
    seconds = statistics.median(sample.seconds for sample in samples)
    return StepSample(samples[len(samples) // 2].work, seconds)


def _warm_up(plan: list[StepShape]) -> list[StepShape]:
    """One shape of each kind, twice: first steps load kernels and grow buffers."""
    first = {}
    for shape in plan:
        first.setdefault(shape.work.kind, shape)
    return [*first.values()] * 2


def _with_progress(
    engine: MeasuredEngine, plan: list[StepShape], time_limit_s: float
) -> Iterable[StepShape]:
    if not engine.is_first_rank:
        return plan
    logger.info("measuring step times for the latency model, at most %.0f s", time_limit_s)
    if sys.stderr.isatty():
        console = Console(stderr=True)
        return track(plan, "Measuring step times", console=console, transient=True)
    return _with_log_lines(plan)


def _with_log_lines(plan: list[StepShape]) -> Iterator[StepShape]:
    logged_s = time.monotonic()
    for done, shape in enumerate(plan):
        if time.monotonic() - logged_s > _LOG_EVERY_S:
            logger.info("measured %d of %d steps", done, len(plan))
            logged_s = time.monotonic()
        yield shape
