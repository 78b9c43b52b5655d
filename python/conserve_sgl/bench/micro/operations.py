"""What single operations of conserve cost, without an engine.

    @micro
    def yield_check() -> Iterator[Row]:
        for n in SIZES:
            yield measure("yield check", n, prepare(n))

is all that a further one takes. Each imports what it measures within itself, so that this module
stays light.
"""

from __future__ import annotations

import functools
import gc
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from rich.table import Table

if TYPE_CHECKING:
    from conserve_sgl.engine.inbox import ArrivalInbox
    from conserve_sgl.ingress.arrival import ArrivalSender
    from conserve_sgl.policy import LatencyModel

__all__ = ["MICROS", "SIZES", "Row", "measure", "micro", "micro_table", "run_micros"]

SIZES = (1, 16, 64, 256)
"""Numbers of requests that an operation is measured at."""

_BUDGET_S, _LEAST, _MOST = 0.3, 200, 20_000


class Row(msgspec.Struct, frozen=True):
    """How long one operation took, over `iterations` calls. `requests` is how many it handled."""

    name: str
    requests: int
    median_us: float
    p99_us: float
    iterations: int


Micro = Callable[[], Iterator[Row]]
MICROS: list[Micro] = []


def micro(function: Micro) -> Micro:
    """Register a micro benchmark."""
    MICROS.append(function)
    return function


def measure(
    name: str,
    requests: int,
    operation: Callable[[], object],
    *,
    before: Callable[[], object] | None = None,
) -> Row:
    """Time `operation`, each call by itself, for about a third of a second.

    `before` runs ahead of every call and is not timed. The garbage collector is off meanwhile.
    """
    for _ in range(min(_LEAST, 50)):
        _once(operation, before)
    took: list[int] = []
    end_s = time.perf_counter() + _BUDGET_S
    gc.disable()
    try:
        while len(took) < _LEAST or (len(took) < _MOST and time.perf_counter() < end_s):
            took.append(_once(operation, before))
    finally:
        gc.enable()
    median, p99 = np.percentile(took, [50, 99]) / 1000
    return Row(name, requests, float(median), float(p99), len(took))


def _once(operation: Callable[[], object], before: Callable[[], object] | None) -> int:
    if before is not None:
        before()
    start_ns = time.perf_counter_ns()
    operation()
    return time.perf_counter_ns() - start_ns


def run_micros(on_row: Callable[[Row], None] = lambda _: None) -> list[Row]:
    """Run every registered one."""
    rows = []
    for function in MICROS:
        for row in function():
            on_row(row)
            rows.append(row)
    return rows


def micro_table(rows: list[Row]) -> Table:
    table = Table(title="Microseconds of one operation")
    for column in ("operation", "requests", "median us", "P99 us", "calls"):
        justify = "left" if column == "operation" else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        times = f"{row.median_us:,.1f}", f"{row.p99_us:,.1f}"
        table.add_row(row.name, str(row.requests), *times, str(row.iterations))
    return table


# ----------------------------------------------------------------------- operations


@micro
def policy_plan() -> Iterator[Row]:
    """One plan with so many requests running, an eighth of them online: beside them, and with an
    online prompt waiting, too.
    """
    from conserve_sgl.config import ConserveConfig
    from conserve_sgl.policy import OnlineReserve, Prompt, Rows, SlackBudget, StepView

    config = ConserveConfig()
    policy = SlackBudget(
        _latency_model(),
        slo=config.slo.objectives(),
        yield_s=config.slo.yield_ms / 1000,
        reserve=OnlineReserve(at_most=config.memory.online_reserve),
        smallest_chunk=16,
    )
    for name, prompts in (("plan a step", ()), ("plan an online prefill", (Prompt(500),))):
        for n in SIZES:
            online = max(1, n // 8)
            view = StepView(
                now_s=1.0,
                free_at_s=1.0,
                online_prompts=prompts,
                online_decoding=Rows(online, 500 * online),
                online_due_s=1.05,
                online_late_s=1.1,
                offline_waiting=4 * n,
                offline_decoding=Rows(n - online, 500 * (n - online)),
                free_rows=64,
                max_rows=512,
                free_kv_tokens=100_000,
                total_kv_tokens=500_000,
                chunk_tokens=2048,
                can_mix=True,
            )
            yield measure(name, n, lambda view=view: policy.plan(view))


@micro
def yield_check() -> Iterator[Row]:
    """What happens between two layer slices: a look at the arrivals, and how far to go on."""
    from conserve_sgl.config import ConserveConfig
    from conserve_sgl.policy.yielding import SliceView, Slicing, YieldMode

    config = ConserveConfig()
    slo, yield_s = config.slo.objectives(), config.slo.yield_ms / 1000
    with _arrival_channel() as (_, inbox):
        for mode in YieldMode:
            slicing = Slicing(yield_s=yield_s, mode=mode, slo=slo)

            def check(slicing: Slicing = slicing) -> int:
                inbox.poll()
                now_s = time.monotonic()
                arrived_s = inbox.oldest_sent_s()
                view = SliceView(now_s=now_s, layers_left=16, layer_s=0.001, arrival_s=arrived_s)
                return slicing.next_layers(view)

            yield measure(f"yield check, {mode.value}", 1, check)


@micro
def victims() -> Iterator[Row]:
    """Choosing who gives way among so many offline requests."""
    from conserve_sgl.policy.victims import Candidate, choose_victims

    for n in SIZES:
        held = [Candidate(index=i, total_tokens=500 + i, checkpointed_tokens=400) for i in range(n)]
        yield measure("choose victims", n, lambda held=held: choose_victims(held, 2000))


@micro
def latency_model() -> Iterator[Row]:
    """Telling the latency model of a step; every 32nd time, so in P99, it fits its costs again."""
    from conserve_sgl.policy import StepWork

    model = _latency_model()
    for n in SIZES:
        work = StepWork(decode_rows=n, decode_context=500 * n)
        seconds = model.predict_s(work)
        yield measure("observe a step", n, lambda w=work, s=seconds: model.observe(w, s))


@micro
def step_record() -> Iterator[Row]:
    """Writing a step of so many rows down, formed and ended, and its bound (`status.enabled`); what
    the online rows got, an eighth of all, besides."""
    from conserve_sgl.engine.step_recorder import StepRecorder
    from conserve_sgl.policy import Bound, Rows, StepView
    from conserve_sgl.policy.bound import BoundSeconds
    from conserve_sgl.status.latency import OnlineLatencies

    slices = SimpleNamespace(count=0, suspensions=0, suspended=None)
    ledger = SimpleNamespace(tokens=Counter(computed=0), counts=Counter(offline_preempted=0))
    aside = SimpleNamespace(slices=slices, parked=())
    recorder = StepRecorder(ledger, aside, SimpleNamespace(received=0))
    bounds, latencies = BoundSeconds(), OnlineLatencies()
    mode = SimpleNamespace(is_extend=lambda: False)
    for n in SIZES:
        online = max(1, n // 8)
        view = StepView(now_s=1.0, online_decoding=Rows(online, 500 * online))
        batch = SimpleNamespace(reqs=[None] * n, forward_mode=mode)

        def record(batch: SimpleNamespace = batch, view: StepView = view) -> None:
            now_s = time.monotonic()
            bounds.look(now_s, Bound.TPOT)
            recorder.formed(now_s, batch, view, Bound.TPOT)
            recorder.ended(now_s, 0.02)

        def note(rows: int = online) -> None:
            latencies.decoded(time.monotonic(), rows)

        yield measure("write a step down", n, record)
        yield measure("count its online tokens", n, note)


def _latency_model() -> LatencyModel:
    """Of an H100 with an 8B model, about."""
    from conserve_sgl.policy import Coefficients, LatencyModel

    costs = Coefficients(step=0.001, token=30e-6, decode=0.006, row=20e-6, context=1e-8)
    return LatencyModel.of_coefficients(costs, layers=32)


@micro
def arrival_inbox() -> Iterator[Row]:
    """The scheduler's look at the arrival channel: nothing there, and so many arrivals there."""
    with _arrival_channel() as (sender, inbox):
        yield measure("look for arrivals, none", 0, inbox.poll)
        for n in (1, 16):
            announce = functools.partial(_announce, sender, inbox, n)
            yield measure("look for arrivals", n, inbox.poll, before=announce)


@contextmanager
def _arrival_channel() -> Iterator[tuple[ArrivalSender, ArrivalInbox]]:
    from conserve_sgl.engine.inbox import ArrivalInbox
    from conserve_sgl.ingress.arrival import ArrivalSender

    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{Path(folder) / 'arrivals'}"
        inbox, sender = ArrivalInbox(endpoint), ArrivalSender(endpoint)
        try:
            while not inbox.received:  # it drops until the two are connected
                _announce(sender, inbox, 1)
                inbox.poll()
            yield sender, inbox
        finally:
            sender.close()
            inbox.close()


def _announce(sender: ArrivalSender, inbox: ArrivalInbox, n: int) -> None:
    for i in range(n):
        inbox.reached(f"request-{i}")  # or those of the call before would pile up
        sender.send((f"request-{i}",))
    time.sleep(0.001)  # until the channel's own threads have handed them over


@micro
def service_class() -> Iterator[Row]:
    """The HTTP layer around a request: told its class by a header, or by its body of 10 kB."""
    from conserve_sgl.ingress.middleware import ServiceClassMiddleware

    chat = {"messages": [{"role": "user", "content": "word " * 2000}], "service_tier": "flex"}
    body = msgspec.json.encode(chat)
    others = [(f"x-header-{i}".encode(), b"value") for i in range(12)]
    for name, headers in (
        ("service class, from a header", [*others, (b"x-sgl-conserve-class", b"offline")]),
        ("service class, from a body", others),
    ):
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": headers,
        }
        layer = ServiceClassMiddleware(_nothing, max_offline=10, retry_after_s=1)
        yield measure(
            name, 1, lambda s=scope, around=layer: _drive(around(s, _receive(body), None))
        )


async def _nothing(*_: object) -> None:
    pass


def _receive(body: bytes) -> Callable[[], Awaitable[dict[str, object]]]:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body}

    return receive


def _drive(coroutine: Coroutine[object, None, None]) -> None:
    """Run a coroutine that never really waits, without an event loop around it."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it waited")
