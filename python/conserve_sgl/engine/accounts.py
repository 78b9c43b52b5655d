"""What the scheduler has done, for people: `/server_info`, `/metrics` and the log."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import asdict

from conserve_sgl.policy import LatencyModel, SlackBudget, Starvation, StepPlan, StepView
from conserve_sgl.policy.bound import BoundSeconds, bound_of
from conserve_sgl.policy.latency import StepKind
from conserve_sgl.policy.throughput import Throughput
from conserve_sgl.settings import OfflineWork
from conserve_sgl.status.latency import NO_QUANTILES, OnlineLatencies

if TYPE_CHECKING:
    from collections.abc import Callable

    from conserve_sgl.checkpoint.checkpointer import Checkpointer
    from conserve_sgl.engine.admission import Admission
    from conserve_sgl.engine.aside import Aside
    from conserve_sgl.engine.host import Req, ScheduleBatch
    from conserve_sgl.engine.intake import Intake
    from conserve_sgl.engine.live_settings import LiveSettings
    from conserve_sgl.engine.metrics import Exporter
    from conserve_sgl.engine.spare import SpareCapacity
    from conserve_sgl.engine.step_recorder import StepRecorder

__all__ = ["Accounts"]

logger = logging.getLogger(__name__)


class Accounts:
    """Takes every step into account, and tells the state.

    Args:
        intake: with the ledger of offline requests, and the announced arrivals.
        live: the settings of now.
        budget: plans the steps.
        model: of their times.
        checkpoints: of offline requests.
        aside: what SGLang does not know of.
        spare: tells what offline work would be taken.
        exporter: writes the state to `/metrics`, or None.
        is_offline: tells an offline request.
        admission: what the offline prompts that were tried last were short of.
        recorder: writes steps down, or None.
        latencies: of online requests, or None.

    Attributes:
        bounds: what bounded offline work, and for how long.
        throughput: offline tokens a second.
        view: what the last step was planned by.
        reserved_tokens: KV that it left to online requests.
    """

    def __init__(
        self,
        intake: Intake,
        *,
        live: LiveSettings,
        budget: SlackBudget,
        model: LatencyModel,
        checkpoints: Checkpointer,
        aside: Aside,
        spare: SpareCapacity,
        exporter: Exporter | None,
        is_offline: Callable[[Req], bool],
        admission: Admission,
        recorder: StepRecorder | None,
        latencies: OnlineLatencies | None,
    ) -> None:
        self._ledger, self._inbox, self._queue = intake.ledger, intake.inbox, intake.queue
        self._live = live
        self._budget = budget
        self._model = model
        self._checkpoints = checkpoints
        self._aside = aside
        self._spare = spare
        self._capabilities = [asdict(each) for each in live.capabilities.all]
        self._exporter = exporter
        self._is_offline = is_offline
        self._admission = admission
        self._recorder = recorder
        self._latencies = latencies
        self.view = StepView(now_s=time.monotonic())
        self.reserved_tokens = 0
        self._starvation = Starvation()
        self.bounds = BoundSeconds()
        self.throughput = Throughput()

    def step(self, batch: ScheduleBatch | None, view: StepView, plan: StepPlan) -> None:
        """A step was planned, and SGLang formed this batch, or None."""
        now_s = time.monotonic()
        self.view, self.reserved_tokens = view, plan.kv_reserve_tokens
        held = self._live.now.holds_offline
        ends = self._live.now.offline is OfflineWork.ENDS
        bound = bound_of(
            view,
            plan,
            held=held,
            ends=ends,
            short_of_kv=self._admission.short_of_kv,
            short_of_adapters=self._admission.short_of_adapters,
        )
        self.bounds.look(now_s, bound)
        # A prefill that goes on was counted when it began.
        self._ledger.step(now_s, None if batch is self._aside.slices.suspended else batch)
        if self._recorder is not None:
            self._recorder.formed(now_s, batch, view, bound)
        self._notice_starvation(now_s, batch, view)
        tokens = self._ledger.tokens
        self.throughput.look(now_s, view, computed=tokens["computed"], output=tokens["output"])
        self._spare.step(now_s, view, waiting=len(self._queue), held=held)
        if self._exporter is not None and self._exporter.is_due(now_s):
            new_ms = [] if self._inbox is None else self._inbox.new_latencies_ms()
            self._exporter.write(now_s, self._state(), new_ms)

    def _notice_starvation(self, now_s: float, batch: ScheduleBatch | None, view: StepView) -> None:
        waiting = view.offline_waiting or view.offline_resident
        waits = bool(waiting) and not self._live.now.holds_offline
        runs = batch is not None and any(map(self._is_offline, batch.reqs))
        said = self._starvation.look(now_s, self.bounds.now, waits=waits, runs=runs)
        if said is not None:
            logger.warning("conserve: %s", said)

    def state(self) -> dict[str, Any]:
        """What `/server_info` shows under `internal_states[i].conserve`, requests that are done
        settled. All ranks are asked, in the same step."""
        self._ledger.close_finished(time.monotonic())
        return self._state()

    @property
    def alone_tokens_per_s(self) -> float | None:
        """Offline tokens a second that the engine would serve with no online request there."""
        return self.throughput.alone_tokens_per_s(self._model.predict_s, self.view)

    def _state(self) -> dict[str, Any]:
        now_s = time.monotonic()
        latencies_ms = [] if self._inbox is None else self._inbox.latencies_ms()
        p50, p99 = np.percentile(latencies_ms or [0.0], (50, 99)).tolist()
        return {
            **self._ledger.state(now_s, parked=len(self._aside.whole)),
            "offline_paused": self._live.now.holds_offline,
            "offline_starved_s": self._starvation.seconds,
            "offline_tokens_per_s": self.throughput.tokens_per_s,
            "offline_alone_tokens_per_s": self.alone_tokens_per_s,
            "spare": self._spare.state(now_s),
            "offline_bound": str(self.bounds.now),
            "offline_bound_s": {str(bound): s for bound, s in self.bounds.total.items()},
            "online_s": self._online_s(now_s),
            "batches_held": self._live.now.batches_held,
            "slo": asdict(self._live.now.slo),
            "margins": self._budget.margins,
            "step_tokens": self._budget.pace.step_tokens,
            "checkpoint": self._checkpoints.state(),
            "latency": _latency_state(self._model),
            "arrivals_received": 0 if self._inbox is None else self._inbox.received,
            "arrival_ms": {"p50": p50, "p99": p99},
            "slices": self._aside.slices.state(),
            "capabilities": self._capabilities,
        }

    def _online_s(self, now_s: float) -> dict[str, dict[str, float | None]]:
        return NO_QUANTILES if self._latencies is None else self._latencies.quantiles(now_s)


def _latency_state(model: LatencyModel) -> dict[str, Any]:
    errors = {kind.name.lower(): asdict(model.errors(kind)) for kind in StepKind}
    return {
        "coefficients_s": asdict(model.coefficients),
        "errors": errors,
        "bias": model.bias,
        "is_biased": model.is_biased,
    }
