"""Offline prefills in layer slices that can be suspended between two layers and resumed there.

SGLang's own `run_batch` runs a sliced batch from its inputs to its sampled tokens; only the model
runner's `forward` is another one for the length of that call: it computes the layers in slices
(SGLang's SPLIT_PREFILL forward mode) and may leave the call between two of them. What a suspended
batch needs to go on, it keeps: the forward batch with its hidden states and residual stream, and
the rows and KV of its requests. Attention metadata is shared by all batches and planned again.

    fresh       a batch that the plan made; nothing computed
    running     within `run`; the event loop waits
    suspended   layers [0, n) computed; rows and KV held; no part of any batch that the loop knows
    done        the sampled tokens are on their way, as those of any prefill

    fresh -> running -> done            running -> suspended -> running, any number of times
    suspended -> given up: rows and KV released, its requests queued again or aborted

One batch at a time is suspended, and no other offline prefill starts meanwhile.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from conserve_sgl.config import ConserveConfig, SloConfig
from conserve_sgl.engine.device import runs_behind
from conserve_sgl.engine.host import (
    ForwardBatch,
    ForwardMode,
    GenerationBatchResult,
    Req,
    ScheduleBatch,
)
from conserve_sgl.engine.inbox import ArrivalInbox
from conserve_sgl.engine.pacing import Pacer
from conserve_sgl.policy import SliceDecision, SliceView, Slicing, Slo, YieldMode

__all__ = ["FORCE_YIELD_ENV", "SUSPENDED", "LayerSlices", "make_decision", "why_whole"]

logger = logging.getLogger(__name__)

FORCE_YIELD_ENV = "CONSERVE_TEST_FORCE_YIELD"
"""For tests: `seed:probability` suspends at random layer boundaries instead of for arrivals."""

SUSPENDED = GenerationBatchResult()
"""The result of a batch that was suspended: there is nothing to process."""

_KEPT_LATENCIES = 4096
_OUTSTANDING_SLICES = 2
_ONLINE_DECAY = 0.95
_LONGEST_WAIT_S = 5.0
_LAYER_WEIGHT = 0.25
_SHORTEST_LAYER_S = 1e-9
_COUNTS = (
    "slices",
    "suspensions",
    "resumes",
    "batches_sliced",
    "batches_given_up",
    "layers_computed",
    "layers_given_up",
)


def why_whole(model: type, server_args: Any) -> str | None:
    """Why no prefill of a server can be sliced, as a clause; None where prefills can.

    Args:
        model: the class of the model.
        server_args: SGLang's ServerArgs.
    """
    if not hasattr(model, "forward_split_prefill"):
        return f"{model.__name__} has no forward_split_prefill"
    if server_args.speculative_algorithm is not None:
        return "with --speculative-algorithm a worker that drafts runs the steps"
    if server_args.enable_return_routed_experts:
        # One buffer holds the experts of all layers of the step that runs, and is read at its end.
        return "--enable-return-routed-experts would return those of the steps in between"
    return None


class _Yielded(BaseException):
    """Leaves SGLang's `run_batch` between two layers; no handler of errors is meant by it."""


class _ForcedYields:
    """For tests: one layer at a time, and a suspension by chance at every boundary."""

    def __init__(self, seed: int, probability: float) -> None:
        self._random = random.Random(seed)
        self._probability = probability

    def worth_slicing(self, layers: int, layer_s: float) -> bool:  # noqa: ARG002
        return True

    def next_layers(self, view: SliceView) -> int:  # noqa: ARG002
        return 0 if self._random.random() < self._probability else 1


def make_decision(mode: YieldMode, yield_s: float, slo: Slo) -> SliceDecision:
    """What decides at layer boundaries; arguments as for `Slicing`."""
    if forced := os.environ.get(FORCE_YIELD_ENV):
        seed, probability = forced.split(":")
        return _ForcedYields(int(seed), float(probability))
    return Slicing(yield_s=yield_s, mode=mode, slo=slo)


class LayerSlices:
    """Runs offline prefills in slices; holds the one that is suspended.

    Args:
        runner: SGLang's ModelRunner.
        config: the configuration.
        is_offline: tells an offline request; only those run in slices.
        layer_s: predicts the seconds of one layer of a batch.
        inbox: where online arrivals are announced; None on ranks other than 0.
        agree: makes every rank take rank 0's value.
        load_counter: HiCache's LayerDoneCounter, or None without HiCache.
    """

    def __init__(
        self,
        runner: Any,
        config: ConserveConfig,
        *,
        is_offline: Callable[[Req], bool],
        layer_s: Callable[[ScheduleBatch], float],
        inbox: ArrivalInbox | None,
        agree: Callable[[int], int],
        load_counter: Any = None,
    ) -> None:
        self.suspended: ScheduleBatch | None = None
        self._forward_batch: ForwardBatch | None = None
        self._runner = runner
        self._is_offline = is_offline
        self._inbox = inbox
        self._agree = agree
        self._load_counter = load_counter
        self._layers = runner.model_config.num_hidden_layers
        self._whole_forward = runner.forward
        self.enabled = config.slices.enabled and self._supported()
        self._predict_layer_s = layer_s
        self._layer_s = 0.0
        self._online_s = 0.0
        self._pacer = Pacer(
            record=self._record_event if runs_behind(runner.device) else None,
            depth=_OUTSTANDING_SLICES,
            clock=time.monotonic,
            while_waiting=self._poll,
            on_done=self._observe,
        )
        self._mode = YieldMode(config.slices.mode)
        self.aim_at(config.slo)
        self._counts = Counter(dict.fromkeys(_COUNTS, 0))
        self._latencies_s: deque[float] = deque(maxlen=_KEPT_LATENCIES)

    def aim_at(self, config: SloConfig) -> None:
        """Decide by these objectives from here on, a suspended prefill included."""
        slo, yield_s = config.objectives(), config.yield_ms / 1e3
        # A yield waits for all slices that are outstanding.
        self._decision = make_decision(self._mode, yield_s / self._pacer.depth, slo)
        if self._inbox is not None and self._mode is YieldMode.SLACK:
            self._inbox.keep_for(min(slo.ttft_allowance_s(0.0), _LONGEST_WAIT_S))

    def _supported(self) -> bool:
        reason = why_whole(type(self._runner.model), self._runner.server_args)
        if reason is not None:
            logger.warning(
                "conserve: %s, so an offline prefill is not sliced: an online arrival waits for a "
                "whole prefill step, which slo.yield_ms and --chunked-prefill-size bound",
                reason,
            )
        return reason is None

    # ------------------------------------------------------------------ the batch

    @property
    def suspended_reqs(self) -> list[Req]:
        """The requests of the suspended batch; they hold rows and KV."""
        return [] if self.suspended is None else self.suspended.reqs

    def accepts(self, batch: ScheduleBatch, *, fresh: bool) -> bool:
        """Whether `batch` runs in slices: the suspended one, or, where `fresh` ones may, an offline
        prefill.

        The answer is the same on all ranks.
        """
        if batch is self.suspended:
            return True
        return (
            fresh
            and self.enabled
            and self.suspended is None
            and batch.forward_mode == ForwardMode.EXTEND
            and all(map(self._is_offline, batch.reqs))
            and _is_plain(batch)
            and bool(self._agree(int(self._worth_slicing(batch))))
        )

    def _worth_slicing(self, batch: ScheduleBatch) -> bool:
        self._layer_s = max(self._predict_layer_s(batch), _SHORTEST_LAYER_S)
        return self._decision.worth_slicing(self._layers, self._layer_s)

    @property
    def layer_s(self) -> float:
        """Predicted seconds of the next layer of the suspended batch."""
        return self._layer_s

    def run(
        self,
        batch: ScheduleBatch,
        run_batch: Callable[[], GenerationBatchResult],
        *,
        until_s: float,
    ) -> GenerationBatchResult:
        """Start `batch`, or go on with it, until it is done or has to make way.

        Args:
            batch: one that `accepts` accepted. When it is suspended it is left without requests:
                they are in `suspended` from then on.
            run_batch: SGLang's `run_batch` of it.
            until_s: see `SliceView`.

        Returns:
            The result of `run_batch`, or `SUSPENDED`.
        """
        started = self._forward_batch if batch is self.suspended else None
        self._counts["resumes"] += started is not None
        self.suspended = self._forward_batch = None
        self._pacer.forget()

        def forward(fresh: ForwardBatch, **_kwargs: Any) -> Any:
            # A batch that goes on keeps the forward batch that it started with; the fresh one has
            # the same inputs, and samples.
            self._forward_batch = fresh if started is None else started
            return self._forward_in_slices(self._forward_batch, until_s)

        try:
            with self._as_forward(forward):
                result = run_batch()
        except _Yielded:
            self._suspend(batch)
            return SUSPENDED
        self._forward_batch = None
        self._counts["batches_sliced"] += 1
        return result

    def give_up(self) -> list[Req]:
        """Drop the suspended batch, computed layers and all; the caller owns its rows and KV."""
        reqs = self.suspended_reqs
        if self._forward_batch is not None:
            self._counts["batches_given_up"] += 1
            self._counts["layers_given_up"] += self._forward_batch.split_index
        self.suspended = self._forward_batch = None
        return reqs

    def note_result(self, batch: ScheduleBatch) -> None:
        """The result of `batch` is here: how long a prefill with online prompts took is what slack
        mode allows for, decaying slowly."""
        if batch.forward_mode.is_extend() and not all(map(self._is_offline, batch.reqs)):
            took_s = time.monotonic() - batch.launch_ts
            self._online_s = max(took_s, self._online_s * _ONLINE_DECAY)

    def _suspend(self, batch: ScheduleBatch) -> None:
        self._pacer.drain()
        self._counts["suspensions"] += 1
        if (arrival_s := self._arrival_s()) is not None:
            self._latencies_s.append(time.monotonic() - arrival_s)
        self._finish_load(batch)
        # The event loop keeps `batch` as its last batch and would merge it into the running one.
        self.suspended = copy.copy(batch)
        batch.reqs = []

    def _finish_load(self, batch: ScheduleBatch) -> None:
        # The counter tells the layers of one load from host memory at a time, the latest batch's.
        if batch.hicache_consumer_index >= 0 and self._load_counter is not None:
            self._load_counter.wait_until(self._load_counter.num_layers - 1)
            batch.hicache_consumer_index = -1

    # ----------------------------------------------------------------- the slices

    def _forward_in_slices(self, forward: ForwardBatch, until_s: float) -> Any:
        forward.forward_mode = ForwardMode.SPLIT_PREFILL
        planned = False
        while True:
            view = self._view(forward, until_s)
            layers = self._agree(self._decision.next_layers(view))
            if layers == 0:
                raise _Yielded
            output = self._run_slice(forward, layers, plan_attention=not planned)
            if forward.split_index == self._layers:
                return output
            planned = True

    def _run_slice(self, forward: ForwardBatch, layers: int, *, plan_attention: bool) -> Any:
        first = forward.split_index
        output = self._pacer.launch(
            lambda: self._whole_forward(
                forward, reinit_attn_backend=plan_attention, split_forward_count=layers
            ),
            layers,
        )
        self._counts["slices"] += 1
        self._counts["layers_computed"] += forward.split_index - first
        return output

    def _view(self, forward: ForwardBatch, until_s: float) -> SliceView:
        self._poll()
        return SliceView(
            now_s=time.monotonic(),
            layers_left=self._layers - forward.split_index,
            layer_s=self._layer_s,
            arrival_s=self._arrival_s(),
            online_s=self._online_s,
            until_s=until_s,
        )

    def _arrival_s(self) -> float | None:
        return None if self._inbox is None else self._inbox.oldest_sent_s()

    def _poll(self) -> None:
        if self._inbox is not None:
            self._inbox.poll()

    def _observe(self, layers: int, seconds: float) -> None:
        # The layers of one batch cost the same, and the one at hand knows best.
        self._layer_s += _LAYER_WEIGHT * (seconds / layers - self._layer_s)

    def _record_event(self) -> Any:
        event = torch.get_device_module(self._runner.device).Event()
        event.record()
        return event

    @contextmanager
    def _as_forward(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Within, `forward` is the runner's."""
        self._whole_forward = self._runner.forward
        self._runner.forward = forward
        try:
            yield
        finally:
            self._runner.forward = self._whole_forward

    # --------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Counters since the start; see docs/layer-slices.md."""
        latencies_ms = [1e3 * seconds for seconds in self._latencies_s]
        p50, p99, longest = np.percentile(latencies_ms or [0.0], (50, 99, 100)).tolist()
        return {
            **self._counts,
            "host_stalls": self._pacer.host_stalls,
            "suspended_requests": len(self.suspended_reqs),
            "arrival_to_yield_ms": {"p50": p50, "p99": p99, "longest": longest},
        }


def _is_plain(batch: ScheduleBatch) -> bool:
    """Whether the split forward computes all that the plain one would."""
    return (
        batch.input_embeds is None
        and batch.replace_embeds is None
        and not batch.return_hidden_states
        and not any(batch.multimodal_inputs or ())
        and all(req.beam_group is None for req in batch.reqs)
    )
