"""Requests that come in, come back, are refused or aborted, and the offline ones that wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus

from conserve_sgl.checkpoint.checkpointer import Checkpointer
from conserve_sgl.engine.aside import Aside
from conserve_sgl.engine.host import AbortReq, Req, _make_abort_req
from conserve_sgl.engine.inbox import ArrivalInbox
from conserve_sgl.engine.ledger import OfflineLedger
from conserve_sgl.engine.observe import OnlineClock
from conserve_sgl.engine.offline_item import offline_item
from conserve_sgl.policy import OfflineQueue

__all__ = ["Intake"]


class Intake:
    """The way of requests to where they wait, and out of the engine without an answer.

    Args:
        queue: where offline requests wait.
        ledger: keeps account of them.
        inbox: where online requests are announced; None on ranks other than 0.
        aside: offline requests that SGLang does not know of.
        checkpoints: of offline requests that gave way.
        release: SGLang's `_release_aborted_request`.
        send_abort: SGLang's `send_abort_output`.
    """

    def __init__(
        self,
        queue: OfflineQueue[Req],
        ledger: OfflineLedger,
        *,
        inbox: ArrivalInbox | None,
        aside: Aside,
        checkpoints: Checkpointer,
        release: Callable[[Req], None],
        send_abort: Callable[[AbortReq, Req], None],
    ) -> None:
        self.queue = queue
        self.ledger = ledger
        self.inbox = inbox
        self._aside = aside
        self._checkpoints = checkpoints
        self._release = release
        self._send_abort = send_abort

    # ------------------------------------------------------------------- coming in

    @property
    def arriving(self) -> int:
        """Online requests that are announced and not here yet; 0 on ranks other than 0."""
        return 0 if self.inbox is None else len(self.inbox)

    def start_clock(self, req: Req) -> None:
        """An online request is here. Once for each: one that was retracted keeps its clock."""
        announced_s = None if self.inbox is None else self.inbox.reached(req.rid)
        if not hasattr(req, "online_clock"):
            req.online_clock = OnlineClock(announced_s or time.monotonic())

    def queue_offline(self, req: Req) -> None:
        """Queue an offline request that is new, or refuse it."""
        counts = self.ledger.counts
        if self.queue.push(req, offline_item(req)):
            counts["offline_accepted"] += 1
            req.time_stats.set_wait_queue_entry_time()
        else:
            counts["offline_refused"] += 1
            full = f"The offline queue is full ({self.queue.capacity} requests)."
            self._refuse(req, HTTPStatus.TOO_MANY_REQUESTS, full)

    def take_back(self, req: Req) -> None:
        """Queue an offline request again that gave way, without row and KV."""
        self._checkpoints.gave_way(req)
        self.ledger.counts["offline_preempted"] += 1
        self.queue.give_back([req])

    # ------------------------------------------------------------------ leaving early

    def refuse_queued(self) -> None:
        """Answer all that wait: the server stops."""
        for req in self._take_queued(None):
            self._refuse(req, HTTPStatus.SERVICE_UNAVAILABLE, "The server is shutting down.")

    def take_out(self, rid: str | None) -> list[Req]:
        """Take the request of that id, or all, from the queue and from aside: for SGLang to abort,
        but for a suspended prefill. Those that held rows and KV hold them no longer."""
        aside = self._aside.take(lambda req: rid in (None, req.rid))
        for req in aside:
            self._checkpoints.release(req)
            self.ledger.close(time.monotonic(), req)
        return aside + self._take_queued(rid)

    def end_suspended(self) -> None:
        """End a suspended prefill that nobody waits for any more.

        SGLang has marked the requests to be aborted. While others of the batch go on, they are
        computed along with them and end with the prefill, as in any batch that runs.
        """
        slices = self._aside.slices
        reqs = slices.suspended_reqs
        if not reqs or any(req.to_finish is None for req in reqs):
            return
        for req in slices.give_up():
            self._checkpoints.release(req)
            self.ledger.close(time.monotonic(), req)
            self._end(req, req.to_finish.to_json())

    def _take_queued(self, rid: str | None) -> list[Req]:
        queue = self.queue
        queued = queue.remove(lambda _: True) if rid is None else queue.remove_rid(rid)
        self._checkpoints.forget(queued)
        self.ledger.removed(queued)
        return queued

    def _refuse(self, req: Req, status: HTTPStatus, message: str) -> None:
        self._end(req, {"type": "abort", "status_code": status, "message": message})

    def _end(self, req: Req, reason: dict) -> None:
        self._release(req)
        self._send_abort(_make_abort_req(req, finished_reason=reason), req)
