"""What the scheduler has done, for people: `/server_info`, `/metrics` and the log."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import asdict

from conserve_sgl.policy import Bound, LatencyModel, SlackBudget, Starvation, StepPlan, StepView
from conserve_sgl.policy.latency import StepKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from conserve_sgl.checkpoint.checkpointer import Checkpointer
    from conserve_sgl.engine.aside import Aside
    from conserve_sgl.engine.host import Req, ScheduleBatch
    from conserve_sgl.engine.intake import Intake
    from conserve_sgl.engine.live_settings import LiveSettings
    from conserve_sgl.engine.metrics import Exporter
    from conserve_sgl.engine.spare import SpareCapacity

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
    ) -> None:
        self._ledger, self._inbox, self._queue = intake.ledger, intake.inbox, intake.queue
        self._live = live
        self._budget = budget
        self._model = model
        self._checkpoints = checkpoints
        self._aside = aside
        self._spare = spare
        self._exporter = exporter
        self._is_offline = is_offline
        self._starvation = Starvation()
        self._bound = Bound.YIELD

    def step(self, batch: ScheduleBatch | None, view: StepView, plan: StepPlan) -> None:
        """A step was planned, and SGLang formed this batch, or None."""
        now_s = time.monotonic()
        self._bound = plan.bound
        # A prefill that goes on was counted when it began.
        self._ledger.step(now_s, None if batch is self._aside.slices.suspended else batch)
        self._notice_starvation(now_s, batch, view)
        held = self._live.now.holds_offline
        self._spare.step(now_s, view, waiting=len(self._queue), held=held)
        if self._exporter is not None and self._exporter.is_due(now_s):
            new_ms = [] if self._inbox is None else self._inbox.new_latencies_ms()
            self._exporter.write(now_s, self._state(), new_ms)

    def _notice_starvation(self, now_s: float, batch: ScheduleBatch | None, view: StepView) -> None:
        waiting = view.offline_waiting or view.offline_resident
        waits = bool(waiting) and not self._live.now.holds_offline
        runs = batch is not None and any(map(self._is_offline, batch.reqs))
        said = self._starvation.look(now_s, self._bound, waits=waits, runs=runs)
        if said is not None:
            logger.warning("conserve: %s", said)

    def state(self) -> dict[str, Any]:
        """What `/server_info` shows under `internal_states[i].conserve`, requests that are done
        settled. All ranks are asked, in the same step."""
        self._ledger.close_finished(time.monotonic())
        return self._state()

    def _state(self) -> dict[str, Any]:
        latencies_ms = [] if self._inbox is None else self._inbox.latencies_ms()
        p50, p99 = np.percentile(latencies_ms or [0.0], (50, 99)).tolist()
        return {
            **self._ledger.state(time.monotonic(), parked=len(self._aside.whole)),
            "offline_paused": self._live.now.holds_offline,
            "offline_starved_s": self._starvation.seconds,
            "spare": self._spare.state(time.monotonic()),
            "offline_bound": str(self._bound),
            "batches_held": self._live.now.batches_held,
            "slo": asdict(self._live.now.slo),
            "margins": self._budget.margins,
            "step_tokens": self._budget.pace.step_tokens,
            "checkpoint": self._checkpoints.state(),
            "latency": _latency_state(self._model),
            "arrivals_received": 0 if self._inbox is None else self._inbox.received,
            "arrival_ms": {"p50": p50, "p99": p99},
            "slices": self._aside.slices.state(),
        }


def _latency_state(model: LatencyModel) -> dict[str, Any]:
    errors = {kind.name.lower(): asdict(model.errors(kind)) for kind in StepKind}
    return {
        "coefficients_s": asdict(model.coefficients),
        "errors": errors,
        "bias": model.bias,
        "is_biased": model.is_biased,
    }
