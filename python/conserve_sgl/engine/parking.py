"""Offline rows that sit out: they leave the running batch and keep their row and their KV.

A row sits out when the plan grants fewer offline rows than decode now; it comes back where it
stopped, with nothing recomputed. Its last token waits in SGLang's FutureMap under the row's index,
which is where a decode step reads it from, so a row that comes back needs no fix-up. So does what
speculative decoding carries from step to step; without overlap scheduling its batch carries that.

    running_batch   rows that decode      --sit_out-->   parked
    parked          rows that hold still  --come_back--> running_batch
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from conserve_sgl.engine.host import BatchedPenalizerOrchestrator, Req, ScheduleBatch

__all__ = ["ParkedRows"]


def _can_split(batch: ScheduleBatch) -> bool:
    # A penalizer's running counts live in one object for the whole batch, which a shallow copy
    # would share; such a batch stays whole.
    return not batch.sampling_info.penalizer_orchestrator.is_required


def _split_off(batch: ScheduleBatch, indices: list[int]) -> ScheduleBatch:
    """Remove the rows at `indices` from `batch`, in place, and return them as a batch."""
    taken = copy.copy(batch)
    taken.sampling_info = copy.copy(batch.sampling_info)
    taken.spec_info = copy.copy(batch.spec_info)  # filtering replaces its tensors
    taken.filter_batch(keep_indices=indices)
    shared = batch.sampling_info.penalizer_orchestrator
    taken.sampling_info.penalizer_orchestrator = BatchedPenalizerOrchestrator(
        shared.vocab_size, taken, set(shared.penalizers)
    )
    leaving = set(indices)
    batch.filter_batch(keep_indices=[i for i in range(len(batch.reqs)) if i not in leaving])
    return taken


class ParkedRows:
    """The rows that sit out, oldest first."""

    def __init__(self) -> None:
        self._batch: ScheduleBatch | None = None

    def __len__(self) -> int:
        return 0 if self._batch is None else len(self._batch.reqs)

    @property
    def reqs(self) -> list[Req]:
        """The requests that sit out; the list is not to be changed."""
        return [] if self._batch is None else self._batch.reqs

    def drop_finished(self) -> None:
        """Forget rows that finished while they sat out: by an abort, or by a step in flight."""
        if self._batch is not None:
            self._batch.filter_batch()
            self._drop_if_empty()

    def sit_out(self, batch: ScheduleBatch, surplus: int, is_offline: Callable[[Req], bool]) -> int:
        """Move the last `surplus` offline rows of `batch` here; `batch` changes in place.

        Returns:
            Rows moved: 0 when the batch cannot be split.
        """
        if surplus <= 0 or not _can_split(batch):
            return 0
        # The members of a beam group decode in lockstep on rows of their own.
        offline = [i for i, r in enumerate(batch.reqs) if r.beam_group is None and is_offline(r)]
        leaving = offline[-surplus:]
        moved = _split_off(batch, leaving)
        if self._batch is None:
            self._batch = moved
        else:
            self._batch.merge_batch(moved)
        batch.batch_is_full = False
        return len(leaving)

    def come_back(self, batch: ScheduleBatch, n: int) -> ScheduleBatch:
        """Move up to `n` rows, oldest first, into the running `batch`.

        Returns:
            The running batch: `batch`, changed in place, or another one when `batch` was empty.
        """
        if n <= 0 or self._batch is None:
            return batch
        if n >= len(self._batch.reqs) or not _can_split(self._batch):
            back, self._batch = self._batch, None
        else:
            back = _split_off(self._batch, list(range(n)))
        if batch.is_empty():
            back.batch_is_full = False
            return back
        batch.merge_batch(back)
        return batch

    def remove(self, matches: Callable[[Req], bool]) -> list[Req]:
        """Take the requests that match out of here; the caller now owns their rows and KV."""
        if self._batch is None:
            return []
        removed = [req for req in self._batch.reqs if matches(req)]
        if removed:
            self._batch.filter_batch(reqs_to_exclude=removed)
            self._drop_if_empty()
        return removed

    def _drop_if_empty(self) -> None:
        if self._batch is not None and self._batch.is_empty():
            self._batch = None
