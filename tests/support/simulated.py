"""The package's simulator with a policy and step times of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from conserve_sgl.config import ConserveConfig, SlicesConfig
from conserve_sgl.policy import Slo, StepPlan, StepView, StepWork
from conserve_sgl.simulate import engine
from conserve_sgl.simulate.conserve import ConserveScheduler
from conserve_sgl.simulate.request import Request
from conserve_sgl.simulate.stock import Limits

__all__ = ["Engine", "Job", "LinearTimes", "Step"]

_HOST = engine.Host(
    overlap=False, step_s=0.0, announce_s=0.0, ingress_s=0.0, egress_s=0.0, think_s=0.0
)
_NO_SLICES = ConserveConfig(slices=SlicesConfig(enabled=False))


@dataclass(frozen=True)
class LinearTimes:
    """A latency model of constants, in seconds, that learns nothing; `upper_s` is `margin` above
    the mean."""

    step: float = 0.03
    token: float = 0.001
    row: float = 0.003
    margin: float = 1.0

    def predict_s(self, work: StepWork) -> float:
        return self.step + self.token * work.prefill_tokens + self.row * work.decode_rows

    def upper_s(self, work: StepWork) -> float:
        return self.margin * self.predict_s(work)

    def prefill_tokens_within_s(self, budget_s: float, resident: int, base: StepWork) -> int:
        del resident  # attention is free here
        return max(int((budget_s / self.margin - self.predict_s(base)) / self.token + 1e-9), 0)

    def observe(self, work: StepWork, seconds: float) -> None:
        """See `LatencyModel`."""


class Job(Request):
    """One request; times are of the fake clock."""

    def __init__(
        self, arrived_s: float, prompt_tokens: int, output_tokens: int, *, offline: bool = False
    ) -> None:
        super().__init__(not offline, arrived_s, prompt_tokens, output_tokens)

    @property
    def arrived_s(self) -> float:
        return self.due_s

    @property
    def done(self) -> bool:
        return self.finished

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.due_s

    @property
    def tpot_s(self) -> float:
        n = len(self.token_times_s)
        return (self.token_times_s[-1] - self.token_times_s[0]) / (n - 1) if n > 1 else 0.0


@dataclass(frozen=True)
class Step:
    """One step that ran."""

    view: StepView
    plan: StepPlan
    work: StepWork
    offline_tokens: int
    offline_rows: int
    began_s: float
    took_s: float


@dataclass(frozen=True)
class _Times:
    """A device whose steps take what a function says."""

    seconds: Callable[[StepWork], float]

    def draw_s(self, work: StepWork, repeated_context: int = 0) -> float:  # noqa: ARG002
        return self.seconds(work)

    def held_s(self, work: StepWork, seconds: float) -> float:  # noqa: ARG002
        return 0.0


class Engine:
    """Runs `online` (by arrival) beside `offline` (all there from the start) under a policy, one
    step after the other and without layer slices."""

    def __init__(
        self,
        policy,
        slo: Slo,
        true_s: Callable[[StepWork], float],
        *,
        chunk_tokens: int = 1024,
        kv_tokens: int = 200_000,
        rows: int = 128,
        can_mix: bool = True,
    ) -> None:
        limits = Limits(kv_tokens=kv_tokens, rows=rows, chunk_tokens=chunk_tokens)
        self.scheduler = ConserveScheduler(
            limits, _NO_SLICES, LinearTimes(), layers=1, policy=policy
        )
        self.scheduler.slo = slo
        self.scheduler.can_mix = can_mix
        self.steps: list[Step] = []
        self.now_s = 0.0
        self._times = _Times(true_s)

    def run(self, online: Sequence[Job], offline: Sequence[Job], *, until_s: float = inf) -> None:
        """Run to `until_s`, or to the end."""
        loop = engine.Engine(
            self.scheduler,
            self._times,
            online=sorted(online, key=lambda job: job.due_s),
            backlog=iter(offline),
            in_flight=len(offline),
            host=_HOST,
            on_step=self._note,
        )
        loop.run(until_s)
        self.now_s = loop.now_s

    def free_kv(self) -> int:
        return self.scheduler.pool.free_tokens

    def _note(self, step: engine.Step) -> None:
        chunks, rows = step.batch.chunks, step.batch.rows
        self.steps.append(
            Step(
                self.scheduler.view,
                self.scheduler.plan,
                step.batch.work,
                sum(chunk.new for chunk in chunks if not chunk.request.online),
                sum(not row.online for row, _ in rows),
                step.began_s,
                step.ends_s - step.began_s,
            )
        )
