"""Measures the engine's own steps at start-up, and gives the latency model fitted to them.

The steps are made the way SGLang makes them: requests with rows and KV, a ScheduleBatch that is
prepared, and `run_batch`, with its graphs and its sampling. What a step reads of the KV cache is
allocated and never computed: what it holds does not change how long it takes. Nothing enters the
radix tree, no request is known to anybody else, and at the end every row and slot is free again.

This runs before the scheduler tells its parent that it is ready, so no request can be waiting and
the server is not healthy before. Tensor-parallel ranks run the same steps; rank 0 keeps the time,
the file and the decision when to stop.

Where steps are overlapped (a GPU), a shape runs several times back to back, each step launched
while the one before it runs, as in the event loop: the first compiles kernels and fills the
pipeline and is not counted, the median of the others is. Where they are not (a CPU), a step's time
is its own, planning and launch included, and once is enough.

`CONSERVE_PROFILE_GRID=FILE` has a denser grid of steps measured after that, every one of them
written to FILE as a step log: what a simulated device is made of (docs/simulate.md).
"""

from __future__ import annotations

import hashlib
import logging
import os
import statistics
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from conserve_sgl.engine.device import device_name, runs_behind
from conserve_sgl.engine.host import (
    DynamicGradMode,
    Req,
    SamplingParams,
    ScheduleBatch,
    Scheduler,
    get_exec,
    release_kv_cache,
    sglang_version,
)
from conserve_sgl.engine.ranks import from_rank_zero
from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import LatencyModel, StepKind, StepSample
from conserve_sgl.profile import EngineIdentity, Profile, ProfileStore
from conserve_sgl.profile.plan import ProfileLimits, StepShape, plan_grid, plan_profile
from conserve_sgl.profile.steps import GRID_ENV, StepLog

__all__ = [
    "TIME_LIMIT_S",
    "identity_of",
    "limits_of",
    "load_or_measure",
    "measure",
    "write_grid",
]

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 20.0
"""When a profile stops, finished or not: a start must not wait long for a slow machine."""

_LEAST_SHAPES = 12
_LOG_EVERY_S = 5.0
_GRID_LIMIT_S = 120.0
_TIMED_STEPS = 3
"""Steps of a shape that are timed where steps are overlapped, after one that is not."""


def load_or_measure(scheduler: Scheduler, counts: Counter[str] | None = None) -> LatencyModel:
    """The latency model of this engine: from its stored profile, or measured now and stored.

    Every rank calls it, at the end of `Scheduler.__init__`; every rank gets the same model. A
    stored file that cannot be used is logged and measured again, and a folder that cannot be
    written costs only the next start. `counts` gets `profiles_measured` and `profiles_rejected`.
    """
    counts = Counter() if counts is None else counts
    counts.update(profiles_measured=0, profiles_rejected=0)
    identity, store = identity_of(scheduler), ProfileStore.of_environment()
    profile = from_rank_zero(scheduler.tp_group, lambda: _load(store, identity, counts))
    if profile is None:
        samples = measure(scheduler)
        profile = Profile(
            identity=identity,
            measured_at=datetime.now(UTC),
            layers=scheduler.model_config.num_hidden_layers,
            samples=samples,
        )
        counts["profiles_measured"] += 1
        if scheduler.tp_group.is_first_rank:
            _save(store, profile)
    model = profile.model()
    _log_fit(model)
    if path := os.environ.get(GRID_ENV):
        write_grid(scheduler, path)
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


# ------------------------------------------------------------------- what it is of


def identity_of(scheduler: Scheduler) -> EngineIdentity:
    """What the step times of this scheduler's engine depend on."""
    config, runner = scheduler.model_config, scheduler.tp_worker.model_runner
    text = config.hf_config.to_json_string()
    backends = (runner.prefill_attention_backend_str, runner.decode_attention_backend_str)
    return EngineIdentity(
        model=str(config.model_path),
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        device=device_name(scheduler.device, runner.gpu_id),
        dtype=str(config.dtype).removeprefix("torch."),
        kv_dtype=str(runner.kv_cache_dtype).removeprefix("torch."),
        quantization=config.quantization,
        tp_size=scheduler.tp_size,
        attention_backend="/".join(dict.fromkeys(map(str, backends))),
        graphs=_graphs(),
        overlap=scheduler.enable_overlap,
        sglang=sglang_version,
    )


def _graphs() -> str:
    config = get_exec().graph.cuda_graph_config
    return f"prefill {config.prefill.backend}, decode {config.decode.backend}"


def limits_of(scheduler: Scheduler) -> ProfileLimits:
    """What one step of this engine can hold."""
    return ProfileLimits(
        chunk_tokens=scheduler.chunked_prefill_size,
        context_tokens=min(scheduler.model_config.context_len, scheduler.max_req_input_len),
        pool_tokens=scheduler.token_to_kv_pool_allocator.available_size(),
        rows=min(scheduler.max_running_requests, scheduler.req_to_token_pool.available_size()),
    )


# ------------------------------------------------------------------------ measuring


def measure(scheduler: Scheduler, time_limit_s: float = TIME_LIMIT_S) -> tuple[StepSample, ...]:
    """Run the steps of a profile on an idle engine, and leave it as it was.

    Returns:
        At least one sample of a prefill and one of a decode step, the same on every rank.
    """
    samples = _measured(scheduler, plan_profile(limits_of(scheduler)), time_limit_s)
    return from_rank_zero(scheduler.tp_group, lambda: tuple(map(_median, samples)))


def write_grid(scheduler: Scheduler, path: str) -> None:
    """Run the steps of `plan_grid` on an idle engine and append each of them to a step log.

    Raises:
        InputError: the file cannot be written.
    """
    samples = _measured(scheduler, plan_grid(limits_of(scheduler)), _GRID_LIMIT_S)
    if not scheduler.tp_group.is_first_rank:
        return
    with closing(StepLog.to(path)) as log:
        for sample in chain.from_iterable(samples):
            log.write(sample)
    logger.info("a grid of %d shapes of steps: %s", len(samples), path)


def _measured(
    scheduler: Scheduler, plan: list[StepShape], time_limit_s: float
) -> list[list[StepSample]]:
    """The samples of each shape of `plan` that there was time for."""
    before = _free(scheduler)
    samples: list[list[StepSample]] = []
    with _as_in_the_event_loop(scheduler):
        runner = _StepRunner(scheduler)
        for shape in _warm_up(plan):
            runner.run(shape)
        started_s = time.perf_counter()
        for n, shape in enumerate(_with_progress(scheduler, plan, time_limit_s)):
            late = time.perf_counter() - started_s > time_limit_s
            if n >= _LEAST_SHAPES and from_rank_zero(scheduler.tp_group, lambda late=late: late):
                logger.warning(
                    "the latency profile stops after %.0f s, with %d of %d steps measured",
                    time_limit_s,
                    n,
                    len(plan),
                )
                break
            samples.append(runner.run(shape))
    assert _free(scheduler) == before, "profiling did not give back its rows and KV"
    return samples


def _median(samples: list[StepSample]) -> StepSample:
    """The sample in the middle, of several of one shape: rows of a decode step grow meanwhile."""
    seconds = statistics.median(sample.seconds for sample in samples)
    return StepSample(samples[len(samples) // 2].work, seconds)


def _free(scheduler: Scheduler) -> tuple[int, int]:
    return (
        scheduler.req_to_token_pool.available_size(),
        scheduler.token_to_kv_pool_allocator.available_size(),
    )


def _warm_up(plan: list[StepShape]) -> list[StepShape]:
    """One shape of each kind, twice: first steps load kernels and grow buffers."""
    first = {}
    for shape in plan:
        first.setdefault(shape.work.kind, shape)
    return [*first.values()] * 2


def _with_progress(
    scheduler: Scheduler, plan: list[StepShape], time_limit_s: float
) -> Iterable[StepShape]:
    if not scheduler.tp_group.is_first_rank:
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


@contextmanager
def _as_in_the_event_loop(scheduler: Scheduler) -> Iterator[None]:
    """The stream and the gradient mode of the event loop; its counters do not count these steps."""
    counters = scheduler.forward_ct, scheduler.processed_tokens_counter
    with (
        DynamicGradMode(),
        scheduler.device_module.StreamContext(scheduler.schedule_stream),
    ):
        try:
            yield
        finally:
            scheduler.device_module.synchronize()
            scheduler.forward_ct, scheduler.processed_tokens_counter = counters
            scheduler._sched_idled = True


class _StepRunner:
    """Runs steps of given shapes through `scheduler.run_batch`, back to back."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._overlapped = scheduler.enable_overlap and runs_behind(scheduler.device)
        self._rng = np.random.default_rng(0)
        self._made = 0

    def run(self, shape: StepShape) -> list[StepSample]:
        """Run `shape`; a sample for each step of it. Its requests are released in any case."""
        steps = self._steps_of(shape)
        prompts = [[self._request(*span) for span in shape.prompts] for _ in range(steps)]
        rows = [self._request(0, context) for context in shape.decode_contexts]
        try:
            running = self._resident(rows) if rows else None
            for some in prompts:
                self._resident([req for req in some if req.extend_end])
            return self._run(shape, prompts, running)
        finally:
            for req in [*chain.from_iterable(prompts), *rows]:
                self._release(req)

    def _steps_of(self, shape: StepShape) -> int:
        if not self._overlapped:
            return shape.steps
        return limits_of(self._scheduler).times(shape, at_most=1 + _TIMED_STEPS)

    def _run(
        self, shape: StepShape, prompts: list[list[Req]], running: ScheduleBatch | None
    ) -> list[StepSample]:
        """A step for each of `prompts`, which are empty for a shape of decode rows alone."""
        in_flight: deque[Any] = deque()
        ends_s = [self._end_of(None)]
        for some in prompts:
            in_flight.append(self._launch(some, running))
            if len(in_flight) > self._overlapped:
                ends_s.append(self._end_of(in_flight.popleft()))
        ends_s += map(self._end_of, in_flight)
        samples = [
            StepSample(_grown(shape, by).work, end_s - start_s)
            for by, (start_s, end_s) in enumerate(pairwise(ends_s))
        ]
        return samples[1:] if self._overlapped and len(samples) > 1 else samples

    def _launch(self, prompts: list[Req], running: ScheduleBatch | None) -> Any:
        batch = self._prefill(prompts, running) if prompts else self._decode(running)
        result = self._scheduler.run_batch(batch)
        # What is launched later writes to this KV only after this step has read it.
        for req in prompts:
            self._release(req)
        return result

    def _end_of(self, result: Any) -> float:
        """Wait for a step, or for all that was launched, as the event loop waits for one."""
        if self._overlapped and result is not None:
            result.copy_done.synchronize()
        else:
            self._scheduler.device_module.synchronize()
        return time.perf_counter()

    def _release(self, req: Req) -> None:
        if req.kv.holds_kv:
            release_kv_cache(req, self._scheduler.tree_cache, checkpoint=False)

    def _request(self, new: int, resident: int) -> Req:
        vocabulary = self._scheduler.model_config.vocab_size
        ids = self._rng.integers(0, vocabulary, size=new + resident, dtype=np.int64)
        self._made += 1
        req = Req(
            rid=f"conserve-profile-{self._made}",
            origin_input_text="",
            origin_input_ids=array("q", ids.tobytes()),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
            vocab_size=vocabulary,
        )
        req.skip_radix_cache_insert = True
        req.init_next_round_input(self._scheduler.tree_cache)
        req.lock = self._scheduler.tree_cache.lock(req.last_node)
        req.extend_end = resident
        return req

    def _batch(self, reqs: list[Req]) -> ScheduleBatch:
        scheduler = self._scheduler
        return ScheduleBatch.init_new(
            reqs,
            scheduler.req_to_token_pool,
            scheduler.token_to_kv_pool_allocator,
            scheduler.tree_cache,
            scheduler.model_config,
            scheduler.enable_overlap,
            scheduler.spec_algorithm,
        )

    def _resident(self, reqs: list[Req]) -> ScheduleBatch | None:
        """Give `reqs` a row and KV up to `extend_end`, without computing it."""
        if not reqs:
            return None
        batch = self._batch(reqs)
        batch.prepare_for_extend()
        batch.prefill_input_ids_cpu = None
        tokens = torch.zeros(len(reqs), dtype=torch.int64, device=batch.device)
        self._scheduler.future_map.stash_bonus_tokens(batch.req_pool_indices, tokens)
        for req in reqs:
            req.prefix_len = req.extend_end
        return batch

    def _prefill(self, reqs: list[Req], running: ScheduleBatch | None) -> ScheduleBatch:
        for req in reqs:
            req.extend_end = len(req.full_untruncated_fill_ids)
        batch = self._batch(reqs)
        batch.prepare_for_extend()
        if running is not None:
            running.prepare_for_decode()
            batch.mix_with_running(running)
            batch.decoding_reqs = running.reqs
        return batch

    def _decode(self, running: ScheduleBatch) -> ScheduleBatch:
        running.prepare_for_decode()
        return running


def _grown(shape: StepShape, by: int) -> StepShape:
    return StepShape(
        prompts=shape.prompts,
        decode_contexts=tuple(context + by for context in shape.decode_contexts),
    )
