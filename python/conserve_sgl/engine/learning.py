"""What is learnt of the steps that the engine runs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from conserve_sgl.engine.step_meter import StepMeter, work_of
from conserve_sgl.policy.latency import LatencyModel, StepSample
from conserve_sgl.profile.steps import StepLog

if TYPE_CHECKING:
    from conserve_sgl.engine.host import ScheduleBatch

__all__ = ["Learning"]

logger = logging.getLogger(__name__)


class Learning:
    """Teaches the latency model what each step took, and writes it down.

    `started`, `launched` and `finished` belong where `StepMeter` has them. Before `begin` steps are
    neither timed nor learnt from.

    Args:
        meter: times the steps.

    Attributes:
        model: the latency model, from `begin` on.
    """

    model: LatencyModel

    def __init__(self, meter: StepMeter) -> None:
        self._meter = meter
        self._log = StepLog()
        self._biased = False

    def begin(self, model: LatencyModel, log: StepLog) -> None:
        """From here on `model` learns, and `log` gets every step."""
        self.model, self._log = model, log

    # --------------------------------------------------------------------- the steps

    def started(self, batch: ScheduleBatch | None) -> None:
        """A step was formed, or (None) there is nothing to run."""
        self._learn(self._meter.started(batch))

    def launched(self) -> None:
        """The step that was started last is on the device."""
        self._meter.launched()

    def launched_in_part(self) -> None:
        """The same, of a step that is not to be learnt from: only a part of it ran."""
        self._meter.launched()
        self._meter.skip()

    def finished(self) -> None:
        """The oldest step's result has been handled."""
        self._learn(self._meter.finished())

    def forget(self) -> None:
        """Leave out the steps in flight."""
        self._meter.forget()

    def _learn(self, steps: list[StepSample]) -> None:
        for step in steps:
            self.model.observe(step.work, step.seconds)
            self._log.write(step)
        if steps and self.model.is_biased is not self._biased:
            self._biased = self.model.is_biased
            logger.warning(
                "the latency model is %s: the last steps differ from it by %+.0f%% in the median",
                "off" if self._biased else "right again",
                self.model.bias * 100,
            )

    # --------------------------------------------------------------------- what it tells

    def busy_until_s(self) -> float:
        """When the steps in flight will be done, in `time.monotonic` seconds."""
        return self._meter.busy_until_s(self.model.predict_s)

    def layer_s(self, batch: ScheduleBatch) -> float:
        """Seconds of one layer of `batch`."""
        return self.model.layer_s(work_of(batch), 1)
