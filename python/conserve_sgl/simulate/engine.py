"""The event loop of SGLang's scheduler on a fake clock, and a device that takes its time.

With overlap scheduling step n + 1 is planned while step n runs:

    host     plan n | handle n-1 | plan n+1 | handle n | ...
    device   ..... step n-1 ....| ..... step n ..... | step n+1

so a plan does not know what the step in flight brings, and an arrival waits for that step and for
the one behind it, which is planned already. Launching a step holds the host for the device's
`launch_s`; a step is not over before all of it was launched. Layer slices hold the loop: their
batch starts when the step before is handled, and the loop goes on when all but the last slice are
done.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import inf

import msgspec

from conserve_sgl.device.table import StepTimes
from conserve_sgl.simulate.conserve import ConserveScheduler
from conserve_sgl.simulate.request import Batch, Request
from conserve_sgl.simulate.stock import StockScheduler

__all__ = ["Engine", "Host", "Step"]

_LONGEST_REST_S = 60.0
"""That a policy may let work wait on an idle device; more is a fault of it."""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What happens outside the device, in seconds.

    Args:
        overlap: whether steps are planned while the one before runs.
        step_s: of the event loop for one step, before the next is planned.
        announce_s: from an online arrival to its announcement.
        ingress_s: from an arrival to the scheduler: HTTP, tokenizing.
        egress_s: from a token's step to the client.
        think_s: from an offline answer to the client's next request.
    """

    overlap: bool = True
    step_s: float = 0.0005
    announce_s: float = 0.0005
    ingress_s: float = 0.0045
    egress_s: float = 0.002
    think_s: float = 0.002


class Step(msgspec.Struct, frozen=True):
    """A batch that ran, for whoever looks on."""

    batch: Batch
    began_s: float
    ends_s: float


class Engine:
    """Runs an online stream beside a backlog.

    Args:
        scheduler: forms the steps; stock or conserve.
        times: of the device.
        online: requests by their arrival.
        backlog: offline requests, without end or not.
        in_flight: how many of the backlog are in the engine or on their way at a time.
        begins_s: when the backlog begins; 0 is when the stream does.
        host: what happens beside the device.
        on_step: told every step as it begins.
        on_time: told the time at every turn.
    """

    def __init__(
        self,
        scheduler: StockScheduler,
        times: StepTimes,
        *,
        online: Sequence[Request] = (),
        backlog: Iterator[Request] | None = None,
        in_flight: int = 0,
        begins_s: float = 0.0,
        host: Host = Host(),  # noqa: B008
        on_step: Callable[[Step], None] = lambda _: None,
        on_time: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.scheduler = scheduler
        self.times = times
        self.host = host
        self.offline: list[Request] = []
        self.now_s = min(begins_s, online[0].due_s if online else begins_s)
        self.steps = 0
        self.busy: list[tuple[float, float]] = []
        self._on_step, self._on_time = on_step, on_time
        self._backlog = backlog or iter(())
        self._free_s = self.now_s
        self._running: Batch | None = None
        self._last: Batch | None = None  # what the scheduler formed before; it may be handled
        self._announced = deque(sorted(online, key=lambda r: r.due_s))
        self._entering: list[tuple[float, int, Request]] = []
        self._entered = 0
        for request in online:
            self._enters(request, request.due_s + host.ingress_s)
        for _ in range(in_flight):
            self._next_of_backlog(begins_s)

    # ------------------------------------------------------------------------- requests

    def _enters(self, request: Request, at_s: float) -> None:
        self._entered += 1
        heapq.heappush(self._entering, (at_s, self._entered, request))

    def _next_of_backlog(self, at_s: float) -> None:
        request = next(self._backlog, None)
        if request is not None:
            request.due_s = at_s
            self.offline.append(request)
            self._enters(request, at_s + self.host.ingress_s)

    def _announce(self, now_s: float) -> None:
        while self._announced and self._announced[0].due_s + self.host.announce_s <= now_s:
            self.scheduler.announce(self._announced.popleft())

    def _arrive(self, now_s: float) -> None:
        self._announce(now_s)
        while self._entering and self._entering[0][0] <= now_s:
            self.scheduler.add(heapq.heappop(self._entering)[2])

    def _next_arrival_s(self) -> float:
        return self._entering[0][0] if self._entering else inf

    # ------------------------------------------------------------------------ the loop

    def run(self, until_s: float = inf, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Run to `until_s`, until `stop` says so, or until nothing is left to do."""
        while self.now_s < until_s and not stop():
            self._on_time(self.now_s)
            self._arrive(self.now_s)
            batch = self.scheduler.next_batch(self.now_s, self._last)
            if batch is None and self._running is None:
                self._last = None
                if not self._wait():
                    return
            elif batch is not None and self._in_slices(batch):
                self._handle_running()
                self._last = self._run_slices(batch)
            else:
                if batch is not None:
                    self._launch(batch)
                before, self._running = self._running, batch
                self._handle(before)
                self._last = batch
                if not self.host.overlap:
                    self._handle_running()

    def _wait(self) -> bool:
        """Nothing runs and nothing can: the next arrival, if there is one."""
        at_s = self._next_arrival_s()
        if self._announced:
            announced_s = self._announced[0].due_s + self.host.announce_s
            at_s = min(at_s, max(announced_s, self.now_s))
        at_s = min(at_s, self._wake_s())
        if at_s == inf:
            return False
        self.now_s = max(at_s, self.now_s)
        return True

    def _wake_s(self) -> float:
        """A policy may let work rest for a while; the loop then turns every millisecond."""
        if not self.scheduler.busy:
            return inf
        if self.now_s - self._free_s > _LONGEST_REST_S and not self._entering:
            raise RuntimeError("requests are waiting, and no step is ever formed for them")
        return self.now_s + 0.001

    def _launch(self, batch: Batch) -> None:
        batch.began_s = max(self.now_s, self._free_s)
        seconds = self.times.draw_s(batch.work, batch.repeated_context)
        self.now_s += self.times.held_s(batch.work, seconds)
        batch.ends_s = self._free_s = max(batch.began_s + seconds, self.now_s)
        self._note(batch, batch.began_s)

    def _note(self, batch: Batch, began_s: float) -> None:
        self.steps += 1
        self.busy.append((began_s, self._free_s))
        self._on_step(Step(batch, began_s, self._free_s))

    def _handle_running(self) -> None:
        batch, self._running = self._running, None
        self._handle(batch)

    def _handle(self, batch: Batch | None) -> None:
        if batch is None:
            return
        self.now_s = max(self.now_s, batch.ends_s)
        sent_s = self.now_s + self.host.egress_s
        for request in self.scheduler.handle(batch, self.now_s):
            if not request.online:
                self._next_of_backlog(sent_s + self.host.think_s)
        self.now_s += self.host.step_s

    # --------------------------------------------------------------------- layer slices

    def _in_slices(self, batch: Batch) -> bool:
        scheduler = self.scheduler
        return isinstance(scheduler, ConserveScheduler) and scheduler.runs_in_slices(batch)

    def _run_slices(self, batch: Batch) -> Batch | None:
        """Run `batch` until it is done, and is in flight, or until it made way: None."""
        scheduler = self.scheduler
        assert isinstance(scheduler, ConserveScheduler)
        scheduler.resumed(batch)
        until_s = scheduler.slices_end_s(self.now_s)
        layer_s = self.times.draw_layer_s(batch.work)
        ends_s = max(self.now_s, self._free_s)
        began_s = ends_s
        while batch.layers < scheduler.layers:
            self._announce(self.now_s)
            layers = scheduler.next_layers(batch, self.now_s, until_s)
            if not layers:
                self._free_s = self.now_s = ends_s
                self._note(batch, began_s)
                scheduler.suspend(batch)
                return None
            batch.layers += layers
            # The host waits for the slice before; this one then runs.
            self.now_s, ends_s = max(self.now_s, ends_s), ends_s + layers * layer_s
            scheduler.slice_took(layers, layers * layer_s)
        batch.began_s, batch.ends_s, self._free_s = began_s, ends_s, ends_s
        self._note(batch, began_s)
        self._running = batch
        return batch
