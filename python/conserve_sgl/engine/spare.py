"""Tells what offline work the engine would take now, once a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conserve_sgl.policy.spare import Spare, SpareMeter

if TYPE_CHECKING:
    from conserve_sgl.engine.ledger import OfflineLedger
    from conserve_sgl.ingress.spare import SpareSender
    from conserve_sgl.policy import StepView

__all__ = ["SpareCapacity"]

_EVERY_S = 1.0


class SpareCapacity:
    """Measures it from the accounts, for the state and for the HTTP process.

    Args:
        ledger: of offline requests.
        sender: to the HTTP process; None on all ranks but the first.
    """

    def __init__(self, ledger: OfflineLedger, sender: SpareSender | None) -> None:
        self._ledger = ledger
        self._sender = sender
        self._meter = SpareMeter()
        self._now = Spare(requests=0)
        self._next_s = 0.0
        self._held = False

    def step(self, now_s: float, view: StepView, *, waiting: int, held: bool) -> None:
        """A step was planned on what `view` shows.

        Args:
            now_s: a monotonic clock.
            waiting: offline requests in the queue.
            held: whether an operator keeps offline work from running.
        """
        if now_s < self._next_s and held is self._held:
            return
        self._next_s, self._held = now_s + _EVERY_S, held
        tokens = self._ledger.tokens
        self._now = self._meter.look(
            now_s,
            tokens=tokens["computed"] + tokens["output"],
            finished=self._ledger.counts["offline_finished"],
            waiting=waiting,
            resident=view.offline_resident,
            max_rows=view.max_rows,
            held=held,
        )
        if self._sender is not None:
            self._sender.send(self._now.requests, held=held)

    def state(self, now_s: float) -> dict[str, Any]:
        """What `/server_info` shows."""
        measured_s = self._now.measured_s
        return {
            "requests": self._now.requests,
            "tokens_per_s": self._now.tokens_per_s,
            "age_s": None if measured_s is None else now_s - measured_s,
        }
