"""How stock SGLang forms a step: prompts before decode, one chunked prompt at a time.

Every request here is of a known length (`ignore_eos`), so SGLang admits a prompt only where all
that it and the running ones may still need is free.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from conserve_sgl.simulate.kv import KvPool
from conserve_sgl.simulate.request import Batch, Chunk, Request

__all__ = ["Limits", "StockOptions", "StockScheduler"]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a server is started with.

    Args:
        kv_tokens: `--max-total-tokens`.
        rows: `--max-running-requests`.
        chunk_tokens: `--chunked-prefill-size`.
    """

    kv_tokens: int = 160_000
    rows: int = 256
    chunk_tokens: int = 4096


class StockOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Flags of SGLang that decide what runs.

    Args:
        priority: `--enable-priority-scheduling`: online prompts first, and an online prompt that
            finds no row takes one from offline work.
        mixed_chunk: `--enable-mixed-chunk`: running rows decode along with prompts.
        prefill_decode_interval: decode steps after each prefill before the next.
        prefill_decode_interval_min_bs: rows below which that does not hold.
        retract_offline_first: `--retraction-policy priority`.
    """

    priority: bool = False
    mixed_chunk: bool = False
    prefill_decode_interval: int = 0
    prefill_decode_interval_min_bs: int = 0
    retract_offline_first: bool = False


class StockScheduler:
    """Forms batches; what is in `running` has been launched at least once."""

    def __init__(self, limits: Limits, options: StockOptions = StockOptions()) -> None:  # noqa: B008
        self.limits = limits
        self.options = options
        self.pool = KvPool(limits.kv_tokens)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.chunk: Request | None = None
        self.retracted = 0
        self._decodes_due = 0

    # ------------------------------------------------------------------ what the engine calls

    def add(self, request: Request) -> None:
        """A request came in, or comes back."""
        self.waiting.append(request)

    def announce(self, request: Request) -> None:
        """A request is on its way in."""

    def next_batch(self, now_s: float, last: Batch | None) -> Batch | None:
        """The step after `last`, whose result may not be there yet; None: nothing can run."""
        self.merge(last)
        batch = None if self._defers_prefill() else self.prefill(now_s)
        if batch is None:
            return self.decode(now_s)
        self._decodes_due = self.options.prefill_decode_interval
        return batch

    def handle(self, batch: Batch, now_s: float) -> list[Request]:
        """The result of `batch` is there; the requests that it ended."""
        done = []
        for chunk in batch.chunks:
            if chunk.last and chunk.epoch == chunk.request.epoch:
                self._got_token(chunk.request, now_s, done)
        for row, epoch in batch.rows:
            # With overlap a row runs once more before its end is seen.
            if epoch == row.epoch and row.read < row.output_tokens:
                self._got_token(row, now_s, done)
        return done

    def _got_token(self, request: Request, now_s: float, done: list[Request]) -> None:
        request.read += 1
        request.token_times_s.append(now_s)
        if request.read >= request.output_tokens:
            self.pool.release(request)
            done.append(request)

    @property
    def busy(self) -> bool:
        """Whether any request is here."""
        return bool(self.waiting or self.running or self.chunk)

    # ---------------------------------------------------------------------------- the batch

    def merge(self, last: Batch | None) -> None:
        """Prompts that `last` completed decode from here on; rows that ended leave."""
        if last is not None:
            self.running += [c.request for c in last.chunks if c.last and _is_new(c)]
        self.running = [row for row in self.running if row.read < row.output_tokens]

    def _defers_prefill(self) -> bool:
        if not self._decodes_due:
            return False
        if len(self.running) < self.options.prefill_decode_interval_min_bs:
            self._decodes_due = 0
            return False
        self._decodes_due -= 1
        return True

    def prefill(self, now_s: float) -> Batch | None:
        riding = self.running if self.options.mixed_chunk else []
        left = self.limits.chunk_tokens - len(riding)
        chunks: list[Chunk] = []
        if self.chunk is not None:
            left -= self._continue_chunk(chunks, left)
        for request in self._ordered(self.waiting):
            if left <= 0 or not self._has_row(request, chunks):
                break
            if not self.fits(request, chunks):
                break
            self.waiting.remove(request)
            left -= self.admit(request, chunks, left)
        if not chunks:
            return None
        return Batch.of(chunks, self._grown(riding), now_s)

    def _ordered(self, waiting: Iterable[Request]) -> list[Request]:
        return sorted(waiting, key=lambda r: not r.online) if self.options.priority else [*waiting]

    def _continue_chunk(self, chunks: list[Chunk], tokens: int) -> int:
        request, self.chunk = self.chunk, None
        assert request is not None
        return self.compute(request, chunks, tokens)

    def admit(self, request: Request, chunks: list[Chunk], tokens: int) -> int:
        """Prefill up to `tokens` of a request that holds nothing; how many it took."""
        found = self.pool.admit(request)
        if not request.epoch:
            request.cached = found
        return self.compute(request, chunks, tokens)

    def compute(self, request: Request, chunks: list[Chunk], tokens: int) -> int:
        resident = request.resident
        new = min(tokens, request.fill_tokens - resident)
        last = resident + new == request.fill_tokens
        chunks.append(Chunk(request, new, resident, last, request.epoch))
        self.pool.grow(request, new)
        if not last:
            self.chunk = request
        return new

    def fits(self, request: Request, chunks: list[Chunk]) -> bool:
        """Whether all that `request` and those before it may still need is free."""
        before = [*self.running, *(chunk.request for chunk in chunks)]
        return self._needs(request) + self.promised(before) <= self.pool.free_tokens

    def _needs(self, request: Request) -> int:
        return request.fill_tokens - self.pool.match(request) + request.left

    def promised(self, requests: Iterable[Request]) -> int:
        """Tokens of KV that requests which hold some will still ask for."""
        tokens = 0
        for r in requests:  # every row of every step: the attributes themselves, not through names
            unfilled, left = r.prompt_tokens + r.read - r.resident, r.output_tokens - r.launched
            tokens += (unfilled if unfilled > 0 else 0) + (left if left > 0 else 0)
        return tokens

    @property
    def rows_held(self) -> int:
        """Request rows that somebody holds, the chunked prompt's included."""
        return len(self.running) + (self.chunk is not None)

    def _has_row(self, request: Request, chunks: list[Chunk]) -> bool:
        fresh = sum(chunk.request is not self.chunk for chunk in chunks)
        if self.rows_held + fresh < self.limits.rows:
            return True
        if not (self.options.priority and request.online):
            return False
        offline = [row for row in self.running if not row.online]
        if offline:
            self.preempt(offline[-1])
        return bool(offline)

    def decode(self, now_s: float) -> Batch | None:
        if not self.running:
            return None
        while self.pool.free_tokens < len(self.running) and len(self.running) > 1:
            self.preempt(min(self.running, key=self._retraction_order))
        return Batch.of([], self._grown(self.running), now_s)

    def _retraction_order(self, row: Request) -> tuple[bool, int, int]:
        spared = self.options.retract_offline_first and row.online
        return (spared, row.read, -row.prompt_tokens)

    def _grown(self, rows: list[Request]) -> list[Request]:
        self.pool.grow_rows(rows)
        return rows

    def preempt(self, request: Request) -> None:
        """Take rows and KV from a running request, which waits again."""
        self.running.remove(request)
        self.give_up(request)
        self.waiting.insert(0, request)

    def give_up(self, request: Request) -> None:
        """Its KV is gone, and a token in flight with it."""
        self.pool.release(request)
        request.launched = request.read
        request.epoch += 1
        self.retracted += 1


def _is_new(chunk: Chunk) -> bool:
    return chunk.epoch == chunk.request.epoch
