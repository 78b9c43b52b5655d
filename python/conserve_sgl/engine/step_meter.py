"""What the engine's real steps hold and how long they take: what the latency model learns from."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from conserve_sgl.policy.latency import StepSample, StepWork

if TYPE_CHECKING:
    from conserve_sgl.engine.host import ScheduleBatch

__all__ = ["Mark", "StepListener", "StepMeter", "work_of"]


def work_of(batch: ScheduleBatch) -> StepWork:
    """What one forward of `batch`, a batch that is ready to run, computes."""
    if not batch.forward_mode.is_extend():
        return StepWork(decode_rows=len(batch.reqs), decode_context=_context(batch))
    spans = list(zip(batch.extend_lens, batch.prefix_lens, strict=True))
    # Decode rows that ride along are the last of a mixed batch, each a prompt of one token.
    rows = len(batch.decoding_reqs or ()) if batch.forward_mode.is_mixed() else 0
    prompts, riding = spans[: len(spans) - rows], spans[len(spans) - rows :]
    return StepWork.of(prompts, (resident + new for new, resident in riding))


def _context(batch: ScheduleBatch) -> int:
    if batch.seq_lens_cpu is None:  # with speculative decoding the device may alone know them
        return sum(req.seqlen for req in batch.reqs)
    return int(batch.seq_lens_cpu.sum())


class Mark(Protocol):
    """The part of a timing event of the device that is used: `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Wait until the device has got this far."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this mark to `end`, on the device's clock."""
        ...


class StepListener(Protocol):
    """Is told of steps, in the order in which they were started."""

    def ended(self, now_s: float, seconds: float) -> None:
        """The oldest step ended and took so long; 0 where that is not known."""
        ...

    def forgotten(self) -> None:
        """Of the steps in flight nothing more will be told."""
        ...


class _Step:
    """A step that was formed; it ends at a mark of the device once it is launched."""

    __slots__ = ("begin", "end", "started_s", "work")

    def __init__(self, work: StepWork, started_s: float, begin: Mark | None) -> None:
        self.work: StepWork | None = work
        self.started_s = started_s
        self.begin = begin
        self.end: Mark | None = None


class StepMeter:
    """Tells each step's seconds, from three calls of the scheduler.

    `started(batch)` belongs at the end of every `get_next_batch_to_run`, with what it answers,
    None included; `launched()` at the end of every `run_batch`; `finished()` at the end of every
    `process_batch_result`. The first and the last return the steps whose time became known.

    What is measured is what a deadline feels: how much later the next token comes because of the
    step. Two cases:

    - serial (a CPU, or no overlap scheduling): the step runs inside one turn of the event loop, so
      its time is from its own start to the next step's, planning and output included, or to the
      turn that found nothing to run.
    - overlapped (a GPU with overlap scheduling): step n runs on the device while the host handles
      the result of n - 1 and launches n + 1. Marks on the device's stream tell the ends apart: the
      time of n is from the end of n - 1 to its own, on the device's clock, or from its own start
      where there was nothing before it. Where the host is slower than the device, what launching
      n takes so belongs to n. On the host's clock it would belong to the step before, whose result
      is looked at only after that: decode steps before mixed ones then seem to take twice as long.

    Args:
        mark: marks the end of what is on the device's stream by now; None is serial.
        clock: seconds, the host's.
        listener: is told of every step, those that nobody learns from too.
    """

    def __init__(
        self,
        mark: Callable[[], Mark] | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        listener: StepListener | None = None,
    ) -> None:
        self._listener = listener
        self._mark = mark
        self._clock = clock
        self._in_flight: deque[_Step] = deque()
        self._last_end_s = 0.0
        self._last_end: Mark | None = None

    def started(self, batch: ScheduleBatch | None) -> list[StepSample]:
        """A step was formed and is about to run, or (None) there was nothing to run."""
        now_s = self._clock()
        samples = [] if self._mark is not None else self._closed(now_s)
        if batch is not None:
            begin = None
            if self._mark is not None and self._last_end is None and not self._in_flight:
                begin = self._mark()
            self._in_flight.append(_Step(work_of(batch), now_s, begin))
        elif not self._in_flight:
            self._last_end = None  # what comes next does not follow what was last
        return samples

    def launched(self) -> None:
        """The step that was started last is on the device."""
        if self._mark is not None and self._in_flight:
            self._in_flight[-1].end = self._mark()

    def skip(self) -> None:
        """Do not learn from the step that was started last: only a part of it runs in it."""
        self._in_flight[-1].work = None

    def finished(self) -> list[StepSample]:
        """The oldest step's result has been handled."""
        return self._closed(self._clock()) if self._mark is not None else []

    def busy_until_s(self, predict_s: Callable[[StepWork], float]) -> float:
        """When the steps in flight will be done, on this meter's clock; in the past if none are."""
        until_s = self._last_end_s
        if self._mark is not None:
            for step in self._in_flight:
                seconds = 0.0 if step.work is None else predict_s(step.work)
                until_s = max(until_s, step.started_s) + seconds
        return until_s

    def forget(self) -> None:
        """Leave out the steps in flight: the engine was paused, or their batch was taken apart."""
        self._in_flight.clear()
        self._last_end = None
        if self._listener is not None:
            self._listener.forgotten()

    def _closed(self, now_s: float) -> list[StepSample]:
        if not self._in_flight:
            return []
        step = self._in_flight.popleft()
        seconds = now_s - max(step.started_s, self._last_end_s)
        if step.end is not None:
            seconds = self._between(step.begin or self._last_end, step.end)
        self._last_end_s, self._last_end = now_s, step.end
        if self._listener is not None:
            self._listener.ended(now_s, seconds)
        return [] if step.work is None else [StepSample(step.work, seconds)]

    @staticmethod
    def _between(begin: Mark | None, end: Mark) -> float:
        """Seconds; 0, which nobody learns from, where the beginning is not known."""
        if begin is None:
            return 0.0
        end.synchronize()  # right behind the step's own result, which has been handled
        return begin.elapsed_time(end) / 1e3
