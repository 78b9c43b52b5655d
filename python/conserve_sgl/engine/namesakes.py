"""Keeps an abort to the request that it names: SGLang's ends all whose ids begin so.

A client that leaves aborts its request by its id, and "job-1" would take "job-10" with it. The
prefix serves nothing here: the HTTP process passes on ids of requests that it knows, whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests of this file need no SGLang
    from conserve_sgl.engine.host import Req, Scheduler

__all__ = ["namesakes_spared"]


@contextmanager
def namesakes_spared(scheduler: Scheduler, rid: str) -> Iterator[None]:
    """Within, `Scheduler.abort_request` for `rid` ends no request but the one of that id.

    Those whose ids begin so are out of its sight, or get back what it marked; queues keep their
    order.
    """

    def is_namesake(req: Req) -> bool:
        return req.rid != rid and req.rid.startswith(rid)

    grammars = scheduler.grammar_manager
    waiting, compiling = scheduler.waiting_queue, grammars.grammar_queue
    running = [req for req in scheduler.collect_inflight_reqs() if is_namesake(req)]
    endings, chunk = [req.to_finish for req in running], scheduler._pending_chunked_abort_req
    scheduler.waiting_queue = [req for req in waiting if not is_namesake(req)]
    grammars.grammar_queue = [req for req in compiling if not is_namesake(req)]
    try:
        yield
    finally:
        left = {id(req) for req in scheduler.waiting_queue}
        scheduler.waiting_queue = [req for req in waiting if is_namesake(req) or id(req) in left]
        grammars.grammar_queue = compiling
        for req, ending in zip(running, endings, strict=True):
            req.to_finish = ending
        marked = scheduler._pending_chunked_abort_req
        if marked is not None and is_namesake(marked):
            scheduler._pending_chunked_abort_req = chunk
