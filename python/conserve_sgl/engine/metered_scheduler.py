"""SGLang's own scheduler with a meter: it decides as ever, and writes down what every step took.

A stock server has it where `CONSERVE_STEP_LOG` names a file and `CONSERVE_CONFIG` none, so that a
baseline leaves the same records as the systems that it is compared with.
"""

from __future__ import annotations

from typing import Any

from conserve_sgl.engine.device import marks_of
from conserve_sgl.engine.host import NextBatchPlan, ScheduleBatch, Scheduler
from conserve_sgl.engine.step_meter import StepMeter
from conserve_sgl.policy.latency import StepSample
from conserve_sgl.profile.steps import StepLog

__all__ = ["MeteredScheduler"]


class MeteredScheduler(Scheduler):
    """Changes nothing that is scheduled; rank 0 appends every step to the step log."""

    def __init__(self, server_args: Any, port_args: Any) -> None:
        super().__init__(server_args, port_args)
        self._meter = StepMeter(marks_of(self))
        self._step_log = StepLog.of_environment() if self.tp_group.is_first_rank else StepLog()

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> NextBatchPlan:
        plan = super().get_next_batch_to_run(running_batch, last_batch)
        self._write(self._meter.started(plan.batch_to_run))
        return plan

    def run_batch(self, batch: ScheduleBatch, pp_proxy_tensors: Any = None) -> Any:
        result = super().run_batch(batch, pp_proxy_tensors)
        self._meter.launched()
        return result

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        super().process_batch_result(batch, result)
        self._write(self._meter.finished())

    def pause_generation(self, recv_req: Any) -> None:
        super().pause_generation(recv_req)
        self._meter.forget()

    def _write(self, steps: list[StepSample]) -> None:
        for step in steps:
            self._step_log.write(step)
