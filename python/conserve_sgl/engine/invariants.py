"""SGLang's invariant checker, told of the rows that are put aside.

SGLang finds the owners of request rows in the running batch, the last batch and the chunked
request; a row that sits out is in none of them and would be reported as a leak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from conserve_sgl.engine.host import Req, SchedulerInvariantChecker

__all__ = ["with_parked_rows"]


@dataclass(kw_only=True, slots=True)
class _Checker(SchedulerInvariantChecker):
    get_parked_reqs: Callable[[], list[Req]]

    def _requests_owning_rows(self) -> list[Req]:
        # No zero-argument super(): a dataclass with slots is not the class it was compiled in.
        owners = SchedulerInvariantChecker._requests_owning_rows(self)
        seen = {id(req) for req in owners}
        parked = (req for req in self.get_parked_reqs() if req.kv.holds_kv)
        return owners + [req for req in parked if id(req) not in seen]


def with_parked_rows(
    checker: SchedulerInvariantChecker, get_parked_reqs: Callable[[], list[Req]]
) -> SchedulerInvariantChecker:
    """A checker like `checker` that also counts the rows of `get_parked_reqs()`."""
    state = {field.name: getattr(checker, field.name) for field in fields(checker)}
    return _Checker(**state, get_parked_reqs=get_parked_reqs)
