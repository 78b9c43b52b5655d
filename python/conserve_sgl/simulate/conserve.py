"""How conserve's scheduler forms a step: `engine/scheduler.py` and its parts, without an engine.

The policy is the real one (`policy.SlackBudget` over a `policy.LatencyModel`, `policy.Slicing`);
what is here is what the engine does with its plans. Where a request may be is as in the table at
the top of `engine/scheduler.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import inf

from conserve_sgl.config import ConserveConfig
from conserve_sgl.policy import (
    Policy,
    SliceView,
    Slicing,
    StepPlan,
    StepView,
    YieldMode,
)
from conserve_sgl.policy.checkpoint_cost import Risk, stride_that_pays
from conserve_sgl.policy.latency import LatencyModel, prompt_token_s
from conserve_sgl.simulate.request import Batch, Chunk, Request
from conserve_sgl.simulate.stock import Limits, StockOptions, StockScheduler
from conserve_sgl.simulate.view import observe

__all__ = ["ConserveScheduler"]

_OUTSTANDING_SLICES = 2
_ONLINE_DECAY = 0.95


class ConserveScheduler(StockScheduler):
    """Forms batches by plans.

    Args:
        limits: of the server.
        config: conserve's own configuration.
        latency: learns from every step.
        layers: of the model.
        policy: plans; the budget of `config` when it is not given.
        copy_s: seconds to copy the KV of so many tokens to the host or back; None without HiCache.
        options: flags of SGLang; those of priorities mean nothing here.
    """

    def __init__(
        self,
        limits: Limits,
        config: ConserveConfig,
        latency: LatencyModel,
        *,
        layers: int,
        policy: Policy | None = None,
        copy_s: float | None = None,
        options: StockOptions = StockOptions(),  # noqa: B008
    ) -> None:
        super().__init__(limits, options)
        self.config = config
        self.latency = latency
        self.layers = layers
        self.slo = config.slo.objectives()
        self.policy = policy or config.budget(latency, page_tokens=1)
        self.slices_enabled = config.slices.enabled
        self.can_mix = True
        self.queue: deque[Request] = deque()
        self.arriving: list[Request] = []
        self.parked: list[Request] = []
        self.aside_chunk: Request | None = None
        self.suspended: Batch | None = None
        self.rows_decoded = True
        self.suspensions = 0
        self.plan: StepPlan | None = None
        self.view: StepView | None = None
        self._copy_s = copy_s
        stride = stride_that_pays(
            config.checkpoint.stride_tokens,
            token_s=prompt_token_s(latency.predict_s),
            risk=Risk().per_token,
        )
        self._stride = max(round(stride), 1)
        self._in_flight: Batch | None = None
        self._last_end_s = -inf
        self._layer_s = 0.0
        self._online_s = 0.0
        yield_s = config.slo.yield_ms / 1000 / _OUTSTANDING_SLICES
        mode = YieldMode(config.slices.mode)
        self._slicing = Slicing(yield_s=yield_s, mode=mode, slo=self.slo)

    # ------------------------------------------------------------------ what the engine calls

    def announce(self, request: Request) -> None:
        if request.online:
            self.arriving.append(request)

    def add(self, request: Request) -> None:
        if not request.online:
            self.queue.append(request)
            return
        if request in self.arriving:
            self.arriving.remove(request)
        self.waiting.append(request)

    def next_batch(self, now_s: float, last: Batch | None) -> Batch | None:
        self.merge(last)
        self.parked = [row for row in self.parked if not row.finished]
        self._in_flight = last
        self.view = observe(self, now_s)
        self.plan = self.policy.plan(self.view)
        self._come_back(self.plan.offline_decode_rows - self.view.offline_decoding.count)
        batch = self._planned(now_s)
        self.rows_decoded = batch is None or bool(batch.rows)
        return batch

    def handle(self, batch: Batch, now_s: float) -> list[Request]:
        self._learn(batch, now_s)
        ended = super().handle(batch, now_s)
        for request in ended:
            if request.online:
                self._tell(request)
        return ended

    def _tell(self, request: Request) -> None:
        times_s = request.token_times_s
        gaps = len(times_s) - 1
        tpot_s = (times_s[-1] - times_s[0]) / gaps if gaps else None
        self.policy.online_ended(ttft_s=times_s[0] - request.due_s, tpot_s=tpot_s)

    def _learn(self, batch: Batch, now_s: float) -> None:
        seconds = now_s - max(batch.planned_s, self._last_end_s)
        self._last_end_s = now_s
        self._in_flight = None
        if any(chunk.request.online for chunk in batch.chunks):
            self._online_s = max(seconds, self._online_s * _ONLINE_DECAY)
        if batch.learned:
            self.latency.observe(batch.work, seconds)

    def free_at_s(self, now_s: float) -> float:
        """When the step in flight is expected to end; in the past if there is none."""
        batch = self._in_flight
        if batch is None or batch.ends_s <= now_s:
            return self._last_end_s
        began_s = max(self._last_end_s, batch.planned_s)
        return began_s + (self.latency.predict_s(batch.work) if batch.learned else 0.0)

    @property
    def busy(self) -> bool:
        held = self.parked or self.queue or self.aside_chunk or self.suspended or self.arriving
        return bool(super().busy or held)

    # ------------------------------------------------------------------------ layer slices

    def runs_in_slices(self, batch: Batch) -> bool:
        """Whether the engine is to run `batch` slice by slice."""
        if batch is self.suspended:
            return True
        fresh = self.slices_enabled and self.plan.in_slices
        if not fresh or self.suspended is not None or batch.rows:
            return False
        if not batch.chunks or any(chunk.request.online for chunk in batch.chunks):
            return False
        self._layer_s = max(self.latency.layer_s(batch.work, 1), 1e-9)
        return self._slicing.worth_slicing(self.layers, self._layer_s)

    def slices_end_s(self, now_s: float) -> float:
        """When the slices of a batch that starts now have to end."""
        assert self.plan is not None
        return now_s + (self.plan.offline_slice_s if self.running else inf)

    def next_layers(self, batch: Batch, now_s: float, until_s: float) -> int:
        """Layers to launch now; 0 suspends `batch`."""
        view = SliceView(
            now_s=now_s,
            layers_left=self.layers - batch.layers,
            layer_s=self._layer_s,
            arrival_s=min((r.due_s for r in self.arriving), default=None),
            online_s=self._online_s,
            until_s=until_s,
        )
        return self._slicing.next_layers(view)

    def slice_took(self, layers: int, seconds: float) -> None:
        """A slice is over; its layers tell what the next ones take."""
        self._layer_s += 0.25 * (seconds / layers - self._layer_s)

    def suspend(self, batch: Batch) -> None:
        """`batch` made way between two layers."""
        batch.learned = False
        self.suspended = batch
        self.suspensions += 1
        if self.chunk is not None and not self.chunk.online:
            self.chunk = None  # it is in the batch

    def resumed(self, batch: Batch) -> None:
        """`batch` goes on."""
        if batch is self.suspended:
            self.suspended = None
            batch.learned = False
            self.chunk = next((c.request for c in batch.chunks if not c.last), None)

    @property
    def suspended_requests(self) -> int:
        return 0 if self.suspended is None else len(self.suspended.chunks)

    # --------------------------------------------------------------------------- the batch

    def _planned(self, now_s: float) -> Batch | None:
        assert self.plan is not None
        self._move_offline_chunk()
        self._load_ahead(now_s)
        return self.prefill(now_s) or self._or_go_on() or self.decode(now_s)

    def _move_offline_chunk(self) -> None:
        tokens = self.plan.offline_prefill_tokens
        granted = tokens > 0 and not self.waiting and self.pool.free_tokens >= tokens
        granted = granted and self.suspended is None
        if self.chunk is not None and not self.chunk.online and not granted:
            self.aside_chunk, self.chunk = self.chunk, None
        elif self.chunk is None and self.aside_chunk is not None and granted:
            self.chunk, self.aside_chunk = self.aside_chunk, None

    def prefill(self, now_s: float) -> Batch | None:
        plan, chunks = self.plan, []
        mixes = plan.mix or self.options.mixed_chunk
        if mixes:
            # A chunk of an online prompt goes with online rows alone.
            self._sit_out(0 if self.view.online_prompts else plan.offline_decode_rows)
        left = self.limits.chunk_tokens - (len(self.running) if mixes else 0)
        purse = plan.offline_prefill_tokens
        may_chunk = self.chunk is None and self.aside_chunk is None
        if self.chunk is not None:
            took = self._chunk_goes_on(chunks, left, purse)
            if took is None:
                return None
            left -= took
            purse -= 0 if chunks and chunks[0].request.online else took
        left = self._prefill_online(chunks, left)
        self._prefill_offline(now_s, chunks, min(left, purse), may_chunk=may_chunk)
        if not chunks:
            return None
        return Batch.of(chunks, self._grown(self.running if mixes else []), now_s)

    def _chunk_goes_on(self, chunks: list[Chunk], left: int, purse: int) -> int | None:
        """Tokens of the chunked prompt; None where an online one finds no KV."""
        assert self.chunk is not None
        if not self.chunk.online:
            return self._continue_chunk(chunks, min(left, purse))
        tokens = min(self.chunk.fill_tokens - self.chunk.resident, left)
        if not self._make_room(tokens + 1 + len(self.running)):
            return None
        return self._continue_chunk(chunks, left)

    def _prefill_online(self, chunks: list[Chunk], left: int) -> int:
        while left > 0 and self.waiting and self.chunk is None:
            request = self.waiting[0]
            if not self._row_for(chunks) or not self._online_fits(request, chunks, left):
                break
            self.waiting.pop(0)
            left -= self.admit(request, chunks, left)
        return left

    def _row_for(self, chunks: list[Chunk]) -> bool:
        if self.rows_held + len(chunks) < self.limits.rows:
            return True
        victim = self._cheapest()
        if victim is not None:
            self.preempt(victim)
        return victim is not None

    def _online_fits(self, request: Request, chunks: list[Chunk], left: int) -> bool:
        """KV that offline requests hold, or may ask for, counts as free; they give way."""
        online = [r for r in (*self.running, *(c.request for c in chunks)) if r.online]
        reclaimable = sum(r.resident - r.shared for r in self._victims())
        room = self.pool.free_tokens + reclaimable
        if self._needs(request) + self.promised(online) > room:
            return False
        new = request.fill_tokens - self.pool.match(request)
        return self._make_room(min(new, left) + 1)

    def _prefill_offline(
        self, now_s: float, chunks: list[Chunk], purse: int, *, may_chunk: bool
    ) -> None:
        if self.suspended is not None:
            return
        for request in self._candidates(now_s):
            if purse <= 0 or self.rows_held + len(chunks) >= self.limits.rows:
                return
            fresh = self.chunk is None
            new = request.fill_tokens - self.pool.match(request) - request.checkpointed
            if new > purse and not (may_chunk and fresh):
                return
            if not self._offline_fits(request, chunks):
                return
            self.queue.remove(request)
            purse -= self.admit(request, chunks, purse)

    def _candidates(self, now_s: float) -> Iterator[Request]:
        """Of the queue's first, as many as the plan admits, those whose KV is on the device."""
        admissions = self.plan.offline_admissions
        first = [self.queue[i] for i in range(min(admissions, len(self.queue)))]
        return (request for request in first if self._is_loaded(request, now_s))

    def _is_loaded(self, request: Request, now_s: float) -> bool:
        """Whether what `request` has on the host is on the device; starts the copy if not. Where
        nothing decodes, nobody waits for the copy but the request itself."""
        if not request.checkpointed or not self.running:
            return True
        if not request.ready_s:
            request.ready_s = now_s + self._copy_s * request.checkpointed
        return request.ready_s <= now_s

    def _load_ahead(self, now_s: float) -> None:
        waiting = self.plan.offline_admissions or self.view.online_prompts or not self.queue
        if not waiting:
            self._is_loaded(self.queue[0], now_s)

    def _offline_fits(self, request: Request, chunks: list[Chunk]) -> bool:
        before = [*self.running, *(chunk.request for chunk in chunks)]
        room = self.pool.free_tokens - self.plan.kv_reserve_tokens
        return self._needs(request) + self.promised(before) <= room

    def admit(self, request: Request, chunks: list[Chunk], tokens: int) -> int:
        if not request.checkpointed:
            return super().admit(request, chunks, tokens)
        found = self.pool.admit(request)
        self.pool.grow(request, max(min(request.checkpointed, request.fill_tokens - 1) - found, 0))
        request.checkpointed, request.ready_s = 0, 0.0
        return self.compute(request, chunks, tokens)

    def _or_go_on(self) -> Batch | None:
        if self.suspended is None:
            return None
        if self.waiting and self.rows_held >= self.limits.rows:
            self._give_up_suspended()
            return None
        if self.chunk is not None:
            return None
        nothing_else = not (self.running or self.waiting or self.arriving)
        if nothing_else or self.plan.offline_slice_s > self._layer_s:
            return self.suspended
        return None

    def decode(self, now_s: float) -> Batch | None:
        self._sit_out(self.plan.offline_decode_rows)
        while self.running and self.pool.free_tokens < len(self.running):
            victim = self._cheapest()
            if victim is None:
                break
            self.preempt(victim)
        if not self.running:
            return None
        return Batch.of([], self._grown(self.running), now_s)

    # ------------------------------------------------------------------ rows that sit out

    def _sit_out(self, offline_rows: int) -> None:
        offline = [row for row in self.running if not row.online]
        leaving = offline[offline_rows:]
        if leaving:
            gone = set(map(id, leaving))
            self.running = [row for row in self.running if id(row) not in gone]
            self.parked += leaving

    def _come_back(self, rows: int) -> None:
        if rows > 0:
            self.running += self.parked[:rows]
            self.parked = self.parked[rows:]

    # ------------------------------------------------------------------------- giving way

    @property
    def rows_held(self) -> int:
        aside = len(self.parked) + (self.aside_chunk is not None) + self.suspended_requests
        return super().rows_held + aside

    def _victims(self) -> list[Request]:
        rows = [row for row in self.running if not row.online]
        return [*self.parked, *rows, *([self.aside_chunk] if self.aside_chunk else [])]

    def _cheapest(self) -> Request | None:
        """Who loses least; between equals one that sits out, then the newest."""
        running = set(map(id, self.running))
        return min(
            self._victims(),
            key=lambda r: (self._lost(r), id(r) in running, -r.resident, -r.due_s),
            default=None,
        )

    def _kept(self, request: Request) -> int:
        """Tokens of a request whose KV is on the host."""
        if self._copy_s is None or not self.config.checkpoint.enabled or not request.read:
            return 0
        return request.prompt_tokens + request.read // self._stride * self._stride

    def _lost(self, request: Request) -> int:
        return max(request.resident - max(self._kept(request), request.shared), 0)

    def _make_room(self, tokens: int) -> bool:
        while self.pool.free_tokens < tokens:
            victim = self._cheapest()
            if victim is None:
                if self.suspended is None:
                    return False
                self._give_up_suspended()
                continue
            self.preempt(victim)
        return True

    def preempt(self, request: Request) -> None:
        if request in self.parked:
            self.parked.remove(request)
        elif request is self.aside_chunk:
            self.aside_chunk = None
        else:
            self.running.remove(request)
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        kept = self._kept(request)
        self.give_up(request)
        request.checkpointed = kept
        self.queue.appendleft(request)

    def _give_up_suspended(self) -> None:
        assert self.suspended is not None
        for chunk in self.suspended.chunks:
            self._requeue(chunk.request)
        self.suspended = None
