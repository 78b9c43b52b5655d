"""Hidden states of a request that gave way, in the shape of any other's.

Its prompt's are a list of one vector for each token, and then comes one vector for each token of
the answer. SGLang takes the prefill with which a request comes back for another prompt; so it does
with a row that decodes beside a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from conserve_sgl.engine.host import Req, SchedulerBatchResultProcessor

__all__ = ["with_flat_hidden_states"]


@dataclass(kw_only=True, slots=True, frozen=True)
class _Processor(SchedulerBatchResultProcessor):
    def _append_prefill_hidden_states(self, *, req: Req, **known: Any) -> int:
        before = len(req.hidden_states)
        # No zero-argument super(): a dataclass with slots is not the class it was compiled in.
        base = SchedulerBatchResultProcessor
        offset = base._append_prefill_hidden_states(self, req=req, **known)
        if req.output_ids and len(req.hidden_states) > before:
            self._make_one_vector(req)
        return offset

    @staticmethod
    def _make_one_vector(req: Req) -> None:
        """Of what was added for a token of the answer: those before it were given already."""
        added = req.hidden_states.pop()
        if req.return_hidden_states == "last":
            req.hidden_states[:] = [added]
        else:
            req.hidden_states.append(added[-1])


def with_flat_hidden_states(
    processor: SchedulerBatchResultProcessor,
) -> SchedulerBatchResultProcessor:
    """A processor like `processor` that does so."""
    state = {field.name: getattr(processor, field.name) for field in fields(processor)}
    return _Processor(**state)
