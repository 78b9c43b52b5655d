"""What the engine's real steps hold and how long they take: what the latency model learns from."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from conserve_sgl.policy.latency import StepSample, StepWork

if TYPE_CHECKING:
    from conserve_sgl.engine.host import ScheduleBatch

__all__ = ["StepMeter", "work_of"]


def work_of(batch: ScheduleBatch) -> StepWork:
    """What one forward of `batch`, a batch that is ready to run, computes."""
    if not batch.forward_mode.is_extend():
        rows = len(batch.reqs)
        return StepWork(decode_rows=rows, decode_context=int(batch.seq_lens_cpu.sum()))
    spans = list(zip(batch.extend_lens, batch.prefix_lens, strict=True))
    # Decode rows that ride along are the last of a mixed batch, each a prompt of one token.
    rows = len(batch.decoding_reqs or ()) if batch.forward_mode.is_mixed() else 0
    prompts, riding = spans[: len(spans) - rows], spans[len(spans) - rows :]
    return StepWork.of(prompts, (resident + new for new, resident in riding))


class StepMeter:
    """Tells each step's seconds, from two calls of the scheduler.

    `started(batch)` belongs at the end of every `get_next_batch_to_run`, with what it answers,
    None included; `finished()` at the end of every `process_batch_result`. Both return the steps
    whose time became known.

    What is measured is what a deadline feels: how much later the next token comes because of the
    step. Two cases:

    - serial (a CPU, or no overlap scheduling): the step runs inside one turn of the event loop, so
      its time is from its own start to the next step's, planning and output included, or to the
      turn that found nothing to run.
    - overlapped (a GPU with overlap scheduling): step n runs on the device while the host handles
      the result of n - 1. The result of n is handled when the device is done with it; its time is
      from the later of its launch and the end of n - 1 to its own end. While the engine is busy
      that is the device's time, and the host's where the host is slower.
    """

    def __init__(self, *, overlapped: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._overlapped = overlapped
        self._clock = clock
        self._in_flight: deque[tuple[StepWork | None, float]] = deque()
        self._last_end_s = 0.0

    def started(self, batch: ScheduleBatch | None) -> list[StepSample]:
        """A step was formed and is about to run, or (None) there was nothing to run."""
        now_s = self._clock()
        samples = [] if self._overlapped else self._closed(now_s)
        if batch is not None:
            self._in_flight.append((work_of(batch), now_s))
        return samples

    def skip(self) -> None:
        """Do not learn from the step that was started last: only a part of it runs in it."""
        _, started_s = self._in_flight.pop()
        self._in_flight.append((None, started_s))

    def finished(self) -> list[StepSample]:
        """The oldest step's result has been handled."""
        return self._closed(self._clock()) if self._overlapped else []

    def busy_until_s(self, predict_s: Callable[[StepWork], float]) -> float:
        """When the steps in flight will be done, on this meter's clock; in the past if none are."""
        until_s = self._last_end_s
        if self._overlapped:
            for work, started_s in self._in_flight:
                seconds = 0.0 if work is None else predict_s(work)
                until_s = max(until_s, started_s) + seconds
        return until_s

    def forget(self) -> None:
        """Leave out the steps in flight: the engine was paused, or their batch was taken apart."""
        self._in_flight.clear()

    def _closed(self, now_s: float) -> list[StepSample]:
        if not self._in_flight:
            return []
        work, started_s = self._in_flight.popleft()
        seconds = now_s - max(started_s, self._last_end_s)
        self._last_end_s = now_s
        return [] if work is None else [StepSample(work, seconds)]
