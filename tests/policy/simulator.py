"""An engine on a fake clock: takes a policy's plans as SGLang would, and takes its own time.

Steps are formed as `engine/scheduler.py` and SGLang form them: prompts before decode, online before
offline, one chunked prompt of each class at a time, rows that sit out keep their KV. How long a
step takes is a function of the simulator's, which is *not* the policy's latency model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from math import inf

from conserve_sgl.policy import Policy, Prompt, Rows, Slo, StepPlan, StepView, StepWork


@dataclass(frozen=True)
class LinearTimes:
    """A latency model of constants, in seconds; `upper_s` is `margin` above the mean."""

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


@dataclass(eq=False)
class Job:
    """One request; times are of the fake clock."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    offline: bool = False
    computed: int = 0
    token_times_s: list[float] = field(default_factory=list)

    @property
    def context(self) -> int:
        return self.computed + len(self.token_times_s)

    @property
    def done(self) -> bool:
        return len(self.token_times_s) == self.output_tokens

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.arrived_s

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
    online_tokens: int
    offline_tokens: int
    offline_rows: int
    began_s: float
    took_s: float


class Engine:
    """Runs `online` (by arrival) beside `offline` (all there from the start) to the end."""

    def __init__(
        self,
        policy: Policy,
        slo: Slo,
        true_s: Callable[[StepWork], float],
        *,
        chunk_tokens: int = 1024,
        kv_tokens: int = 200_000,
        max_rows: int = 64,
        can_mix: bool = True,
        on_step: Callable[[StepWork, float], None] = lambda _work, _s: None,
    ) -> None:
        self.policy, self.slo, self.true_s, self.on_step = policy, slo, true_s, on_step
        self.chunk_tokens, self.kv_tokens = chunk_tokens, kv_tokens
        self.max_rows, self.can_mix = max_rows, can_mix
        self.now_s = 0.0
        self.coming: deque[Job] = deque()
        self.waiting: deque[Job] = deque()
        self.backlog: deque[Job] = deque()
        self.chunk: Job | None = None
        self.offline_chunk: Job | None = None
        self.running: list[Job] = []
        self.rows_decoded = True
        self.steps: list[Step] = []

    def run(self, online: Iterable[Job], offline: Iterable[Job], *, until_s: float = inf) -> None:
        self.coming = deque(sorted(online, key=lambda job: job.arrived_s))
        self.backlog = deque(offline)
        for _ in count():
            self._arrive()
            if self.now_s >= until_s or not self._step():
                return

    # ------------------------------------------------------------------- the step

    def _step(self) -> bool:
        view = self.view()
        plan = self.policy.plan(view)
        work, online_tokens, offline_tokens, decoding = self._form(plan)
        if not (work.prefill_tokens or work.decode_rows):
            return self._idle()
        took_s = self.true_s(work)
        began_s, self.now_s = self.now_s, self.now_s + took_s
        self._finish(decoding)
        self.on_step(work, took_s)
        offline_rows = sum(job.offline for job in decoding)
        self.steps.append(
            Step(view, plan, work, online_tokens, offline_tokens, offline_rows, began_s, took_s)
        )
        return True

    def _form(self, plan: StepPlan) -> tuple[StepWork, int, int, list[Job]]:
        prompts: list[tuple[int, int]] = []
        self._completed: list[Job] = []
        online_tokens = self._prefill_online(prompts)
        offline_tokens = 0
        if not (self.chunk or self.waiting) and not online_tokens:
            offline_tokens = self._prefill_offline(plan, prompts)
        decoding = self._decoding(plan) if not prompts or plan.mix else []
        work = StepWork.of(prompts, [job.context for job in decoding])
        self.rows_decoded = bool(decoding) or not prompts
        return work, online_tokens, offline_tokens, decoding

    def _prefill_online(self, prompts: list[tuple[int, int]]) -> int:
        left = self.chunk_tokens
        spent = 0
        while left > 0 and (self.chunk or self.waiting):
            job = self.chunk or self.waiting[0]
            if job is not self.chunk:
                if not self._make_room(job):
                    break
                self.waiting.popleft()
            taken = self._compute(job, left, prompts)
            self.chunk = None if job.computed == job.prompt_tokens else job
            left, spent = left - taken, spent + taken
        return spent

    def _prefill_offline(self, plan: StepPlan, prompts: list[tuple[int, int]]) -> int:
        left, admissions, spent = plan.offline_prefill_tokens, plan.offline_admissions, 0
        while left > 0 and (self.offline_chunk or (self.backlog and admissions > 0)):
            job = self.offline_chunk or self.backlog[0]
            if job is not self.offline_chunk:
                needed = job.prompt_tokens + job.output_tokens
                if self.free_kv() - needed < plan.kv_reserve_tokens:
                    break
                self.backlog.popleft()
                admissions -= 1
            taken = self._compute(job, left, prompts)
            self.offline_chunk = None if job.computed == job.prompt_tokens else job
            left, spent = left - taken, spent + taken
        return spent

    def _compute(self, job: Job, left: int, prompts: list[tuple[int, int]]) -> int:
        taken = min(left, job.prompt_tokens - job.computed)
        prompts.append((taken, job.computed))
        job.computed += taken
        if job.computed == job.prompt_tokens:
            self._completed.append(job)
        return taken

    def _decoding(self, plan: StepPlan) -> list[Job]:
        offline = [job for job in self.running if job.offline][: plan.offline_decode_rows]
        return [job for job in self.running if not job.offline] + offline

    def _finish(self, decoding: list[Job]) -> None:
        for job in self._completed:
            job.token_times_s.append(self.now_s)
            if not job.done:
                self.running.append(job)
        for job in decoding:
            job.token_times_s.append(self.now_s)
        self.running = [job for job in self.running if not job.done]
        # Rows that decoded go behind those that sat out: the oldest comes back first.
        rested = [job for job in self.running if job not in decoding]
        self.running = rested + [job for job in self.running if job in decoding]

    def _make_room(self, job: Job) -> bool:
        """Preempt offline rows, newest first, until the prompt has KV."""
        while self.free_kv() < job.prompt_tokens + job.output_tokens:
            victims = [other for other in self.running if other.offline]
            if not victims:
                return False
            self.running.remove(victims[-1])
            victims[-1].computed = 0
            victims[-1].prompt_tokens += len(victims[-1].token_times_s)
            victims[-1].output_tokens -= len(victims[-1].token_times_s)
            victims[-1].token_times_s = []
            self.backlog.appendleft(victims[-1])
        return True

    def _idle(self) -> bool:
        if not self.coming:
            left = [*self.backlog, *self.running, *self.waiting]
            assert not left, "work, but no step for it"
            return False
        self.now_s = max(self.now_s, self.coming[0].arrived_s)
        return True

    def _arrive(self) -> None:
        while self.coming and self.coming[0].arrived_s <= self.now_s:
            self.waiting.append(self.coming.popleft())

    # ------------------------------------------------------------------- the view

    def free_kv(self) -> int:
        held = [*self.running, *(job for job in (self.chunk, self.offline_chunk) if job)]
        return self.kv_tokens - sum(job.context for job in held)

    def view(self) -> StepView:
        online = [job for job in self.running if not job.offline]
        offline = [job for job in self.running if job.offline]
        pace = self.policy.pace
        dues = [pace.next_due_s(j.token_times_s[0], len(j.token_times_s)) for j in online]
        return StepView(
            now_s=self.now_s,
            online_prompts=tuple(
                Prompt(
                    job.prompt_tokens - job.computed,
                    job.computed,
                    self.slo.first_due_s(job.arrived_s),
                )
                for job in [*([self.chunk] if self.chunk else []), *self.waiting]
            ),
            online_decoding=_rows(online),
            online_due_s=min((due[0] for due in dues), default=inf),
            online_late_s=min((due[1] for due in dues), default=inf),
            offline_waiting=len(self.backlog),
            offline_chunk=self.offline_chunk
            and Prompt(
                self.offline_chunk.prompt_tokens - self.offline_chunk.computed,
                self.offline_chunk.computed,
            ),
            offline_decoding=_rows(offline),
            free_rows=10**6,
            max_rows=self.max_rows,
            free_kv_tokens=self.free_kv(),
            total_kv_tokens=self.kv_tokens,
            chunk_tokens=self.chunk_tokens,
            rows_decoded=self.rows_decoded,
            can_mix=self.can_mix,
        )


def _rows(jobs: list[Job]) -> Rows:
    return Rows(len(jobs), sum(job.context for job in jobs))
