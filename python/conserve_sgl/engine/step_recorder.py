"""Writes down what each step was, for people: into the ring of `status/steps.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conserve_sgl.policy import Bound, StepView
from conserve_sgl.status.steps import StepRing

if TYPE_CHECKING:
    from conserve_sgl.engine.aside import Aside
    from conserve_sgl.engine.host import ScheduleBatch
    from conserve_sgl.engine.inbox import ArrivalInbox
    from conserve_sgl.engine.ledger import OfflineLedger

__all__ = ["StepRecorder"]


class StepRecorder:
    """Takes in every step when it is formed and when it ends.

    No request is looked at: who is in a step follows from what was counted for its plan. Allocates
    nothing that stays.

    Args:
        ledger: of offline requests; has counted the step's prompts.
        aside: what sits out, and what runs in slices.
        inbox: where online requests are announced; None on ranks other than 0.

    Attributes:
        ring: of the steps.
    """

    def __init__(self, ledger: OfflineLedger, aside: Aside, inbox: ArrivalInbox | None) -> None:
        self.ring = StepRing()
        self._ledger = ledger
        self._aside = aside
        self._inbox = inbox
        self._computed = ledger.tokens["computed"]
        self._slices = aside.slices.count

    def formed(
        self, now_s: float, batch: ScheduleBatch | None, view: StepView, bound: Bound
    ) -> None:
        """SGLang formed this step, or (None) there is nothing to run."""
        computed = self._ledger.tokens["computed"]
        offline_prompts, self._computed = computed - self._computed, computed
        if batch is None:
            return
        prompts, rows = 0, len(batch.reqs)
        if batch.forward_mode.is_extend():
            rows = len(batch.decoding_reqs or ())
            prompts = max(batch.extend_num_tokens - rows, 0)
            if batch is self._aside.slices.suspended:  # it was counted when it began
                offline_prompts = prompts
        online_rows = min(view.online_decoding.count, rows)
        self.ring.formed(
            now_s,
            online_prompt_tokens=max(prompts - offline_prompts, 0),
            online_rows=online_rows,
            offline_prompt_tokens=min(offline_prompts, prompts),
            offline_rows=rows - online_rows,
            offline_parked=len(self._aside.parked),
            bound=bound,
            arrivals=0 if self._inbox is None else self._inbox.received,
            preemptions=self._ledger.counts["offline_preempted"],
            yields=self._aside.slices.suspensions,
        )

    def ended(self, now_s: float, seconds: float) -> None:
        """See `StepListener`."""
        slices = self._aside.slices.count
        self.ring.ended(now_s, seconds, sliced=slices != self._slices)
        self._slices = slices

    def forgotten(self) -> None:
        """See `StepListener`."""
        self.ring.forget()
