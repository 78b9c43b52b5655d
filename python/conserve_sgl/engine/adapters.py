"""Adapters (LoRA): a batch holds a few at a time, and so does all that holds a row.

SGLang lets a request in when its adapter fits beside those of the requests that run; the base model
counts as one. It does not see what is put aside, and that comes back into its batches as it is. So
the adapters of all that holds a row, in SGLang's sight or not, are kept within the limit, and
whatever is aside may come back, or go on, whenever the plan lets it.

Online requests do not wait for a place among offline adapters: where theirs do not fit beside them,
offline requests with others give way, and are passed over in the queue until there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:  # the tests of this file need no SGLang
    from conserve_sgl.engine.aside import Aside
    from conserve_sgl.engine.host import Req, ScheduleBatch
    from conserve_sgl.engine.memory import KvMemory

__all__ = ["Adapters", "OnlineDrainer"]

Adapter: TypeAlias = "str | None"
"""SGLang's id of one; None is the base model."""


class _Host(Protocol):
    """What of SGLang's scheduler is read here."""

    chunked_req: Req | None
    waiting_queue: list[Req]
    enable_lora: bool
    tp_worker: Any


class Adapters:
    """The adapters of one scheduler's requests.

    Args:
        host: SGLang's scheduler.
        aside: what it does not see.
        memory: whoever gives way does it there.
        is_offline: tells an offline request.
    """

    def __init__(
        self,
        host: _Host,
        *,
        aside: Aside,
        memory: KvMemory,
        is_offline: Callable[[Req], bool],
    ) -> None:
        self._host = host
        self._aside = aside
        self._memory = memory
        self._is_offline = is_offline

    def make_way(self, running: ScheduleBatch) -> None:
        """Preempt offline requests whose adapters would keep online ones waiting.

        Args:
            running: loses its rows that give way.
        """
        if not self._host.enable_lora:
            return
        offline = [*filter(self._may_give_way, running.reqs), *self._aside.reqs]
        staying = self._staying(running)
        leaving = {req.lora_id for req in offline} - staying
        leaving -= self._kept(offline, staying | self._asked_for(), staying)
        if not leaving:
            return
        if any(req.lora_id in leaving for req in self._aside.slices.suspended_reqs):
            self._memory.preempt_suspended()
        self._memory.preempt_aside(lambda req: req.lora_id in leaving)
        rows = [r for r in running.reqs if r.lora_id in leaving and self._may_give_way(r)]
        if rows:
            self._memory.preempt_rows(running, rows)
        running.batch_is_full = False

    def may_run(self, running: ScheduleBatch) -> Callable[[str], bool]:
        """Whether another offline request with an adapter ("" for none) may be let in; it counts
        from then on, so each answer is for one that is let in at once."""
        if not self._host.enable_lora:
            return lambda _: True
        staying = self._staying(running)
        held = staying | self._asked_for() | _of(self._aside.reqs) | _of(running.reqs)

        def fits(adapter: str) -> bool:
            if (adapter or None) not in staying and not self._fit(held | {adapter or None}):
                return False
            held.add(adapter or None)
            return True

        return fits

    # ------------------------------------------------------------------- who has which

    def _may_give_way(self, req: Req) -> bool:
        # SGLang cannot take up a beam search again, and one that is over leaves by itself.
        return self._is_offline(req) and req.beam_group is None and not req.finished()

    def _staying(self, running: ScheduleBatch) -> set[Adapter]:
        """Of requests that hold a row and keep it."""
        chunk = self._host.chunked_req
        reqs = [req for req in running.reqs if not self._may_give_way(req)]
        return _of(reqs if chunk is None else [*reqs, chunk])

    def _asked_for(self) -> set[Adapter]:
        """Of online requests that wait."""
        return _of(self._host.waiting_queue)

    def _kept(
        self, offline: Iterable[Req], wanted: set[Adapter], staying: set[Adapter]
    ) -> set[Adapter]:
        """Of `offline`, in its order, what fits beside all that online requests want."""
        kept = set(staying)
        for adapter in dict.fromkeys(req.lora_id for req in offline):
            if self._fit(wanted | kept | {adapter}):
                kept.add(adapter)
        return kept

    def _fit(self, adapters: set[Adapter]) -> bool:
        return self._host.tp_worker.model_runner.lora_manager.validate_lora_batch(adapters)


def _of(reqs: Iterable[Req]) -> set[Adapter]:
    return {req.lora_id for req in reqs}


class OnlineDrainer:
    """SGLang's LoRADrainer, which must not take offline requests for starving.

    It has adapters that run drain for the sake of requests that wait for another, and offline
    requests wait for as long as online work wants.
    """

    def __init__(self, drainer: Any, is_offline: Callable[[Req], bool]) -> None:
        self._drainer = drainer
        self._is_offline = is_offline

    def update_draining_state(self, waiting_queue: list[Req], running_reqs: list[Req]) -> None:
        """As SGLang's, of the online requests that wait."""
        online = [req for req in waiting_queue if not self._is_offline(req)]
        self._drainer.update_draining_state(online, running_reqs)

    def can_schedule(self, req: Req) -> bool:
        """As SGLang's."""
        return self._drainer.can_schedule(req)
