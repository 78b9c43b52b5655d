"""How an engine's steps are run and told for its latency profile, by its scheduler.

The steps are made the way SGLang makes them: requests with rows and KV, a ScheduleBatch that is
prepared, and `run_batch`, with its graphs and its sampling. What a step reads of the KV cache is
allocated and never computed: what it holds does not change how long it takes. Nothing enters the
radix tree, no request is known to anybody else, and at the end every row and slot is free again.

This runs before the scheduler tells its parent that it is ready, so no request can be waiting and
the server is not healthy before. Which steps are run, and for how long, `profile/measure.py` says.

Where steps are overlapped (a GPU), a shape runs several times back to back, each step launched
while the one before it runs, as in the event loop: the first compiles kernels and fills the
pipeline and is not counted, the median of the others is. Where they are not (a CPU), a step's time
is its own, planning and launch included, and once is enough.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
import torch

from conserve_sgl.checkpoint.states import StateSlots
from conserve_sgl.engine.device import device_name, runs_behind
from conserve_sgl.engine.host import (
    DynamicGradMode,
    Req,
    SamplingParams,
    ScheduleBatch,
    Scheduler,
    get_exec,
    get_lora,
    get_spec,
    max_speculative_num_draft_tokens,
    release_kv_cache,
    sglang_version,
)
from conserve_sgl.engine.ranks import from_rank_zero
from conserve_sgl.policy.latency import LatencyModel, StepSample
from conserve_sgl.profile import EngineIdentity, measure
from conserve_sgl.profile.measure import RunShape
from conserve_sgl.profile.plan import ProfileLimits, StepShape

__all__ = ["ProfiledEngine", "load_or_measure"]

_TIMED_STEPS = 3
"""Steps of a shape that are timed where steps are overlapped, after one that is not."""

T = TypeVar("T")


def load_or_measure(scheduler: Scheduler, counts: Counter[str] | None = None) -> LatencyModel:
    """See `profile.measure.load_or_measure`; called at the end of `Scheduler.__init__`."""
    return measure.load_or_measure(ProfiledEngine(scheduler), counts)


class ProfiledEngine:
    """The engine of `scheduler`, on this rank; see `profile.measure.MeasuredEngine`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @property
    def identity(self) -> EngineIdentity:
        """What step times depend on."""
        scheduler = self._scheduler
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
            lora_backend=get_lora().lora_backend if scheduler.enable_lora else None,
            drafts=_drafts(),
        )

    @property
    def limits(self) -> ProfileLimits:
        """What one step can hold."""
        scheduler = self._scheduler
        return ProfileLimits(
            chunk_tokens=scheduler.chunked_prefill_size,
            context_tokens=min(scheduler.model_config.context_len, scheduler.max_req_input_len),
            pool_tokens=scheduler.token_to_kv_pool_allocator.available_size(),
            rows=min(scheduler.max_running_requests, scheduler.req_to_token_pool.available_size()),
            step_tokens=max_speculative_num_draft_tokens() or 1,
            mixes=scheduler.spec_algorithm.is_none(),
        )

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return self._scheduler.model_config.num_hidden_layers

    @property
    def is_first_rank(self) -> bool:
        """Whether this process is rank 0."""
        return self._scheduler.tp_group.is_first_rank

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """What `make()` gives on rank 0."""
        return from_rank_zero(self._scheduler.tp_group, make)

    @contextmanager
    def stepping(self) -> Iterator[RunShape]:
        """Within it shapes can be run; the engine must be idle, and is as it was after it."""
        before = _free(self._scheduler)
        with _as_in_the_event_loop(self._scheduler):
            yield _StepRunner(self._scheduler, self.limits).run
        assert _free(self._scheduler) == before, "profiling did not give back its rows and KV"


def _graphs() -> str:
    config = get_exec().graph.cuda_graph_config
    return f"prefill {config.prefill.backend}, decode {config.decode.backend}"


def _drafts() -> str | None:
    spec = get_spec()
    if spec.speculative_algorithm is None:
        return None
    return f"{spec.speculative_algorithm}, {max_speculative_num_draft_tokens()} tokens"


def _free(scheduler: Scheduler) -> tuple[float, ...]:
    return (
        scheduler.req_to_token_pool.available_size(),
        scheduler.token_to_kv_pool_allocator.available_size(),
        StateSlots(scheduler.tree_cache).free,
    )


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

    def __init__(self, scheduler: Scheduler, limits: ProfileLimits) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._overlapped = scheduler.enable_overlap and runs_behind(scheduler.device)
        self._drafts = not scheduler.spec_algorithm.is_none()
        self._rng = np.random.default_rng(0)
        self._made = 0

    def run(self, shape: StepShape) -> list[StepSample]:
        """Run `shape`; a sample for each step of it. Its requests are released in any case."""
        steps = self._steps_of(shape)
        prompts = [[self._request(*span) for span in shape.prompts] for _ in range(steps)]
        rows = [self._row(context) for context in shape.decode_contexts]
        try:
            running = self._running(rows) if rows else None
            for some in prompts:
                self._resident([req for req in some if req.extend_end])
            return self._run(shape, prompts, running)
        finally:
            for req in [*chain.from_iterable(prompts), *rows]:
                self._release(req)

    def _steps_of(self, shape: StepShape) -> int:
        if not self._overlapped:
            return shape.steps
        return self._limits.times(shape, at_most=1 + _TIMED_STEPS)

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

    def _row(self, context: int) -> Req:
        return self._request(1, context - 1) if self._drafts else self._request(0, context)

    def _running(self, rows: list[Req]) -> ScheduleBatch:
        """A batch of `rows` that can decode."""
        if not self._drafts:
            return self._resident(rows)
        # What a drafting worker starts from, only a prefill of its own leaves.
        self._resident([req for req in rows if req.extend_end])
        batch = self._prefill(rows, None)
        self._end_of(self._scheduler.run_batch(batch))
        return batch

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
        for req in running.reqs if self._drafts else ():
            # No result is looked at: as if all drafts were right, and so with KV for any that are.
            req.kv.kv_committed_len += self._limits.step_tokens
        return running


def _grown(shape: StepShape, by: int) -> StepShape:
    return StepShape(
        prompts=shape.prompts,
        decode_contexts=tuple(context + by for context in shape.decode_contexts),
    )
