"""Which steps a profile measures, so that every cost of the latency model shows in some of them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec

from conserve_sgl.policy.latency import StepWork

__all__ = ["ProfileLimits", "StepShape", "plan_grid", "plan_profile"]

_SHORTEST_PROMPT = 16
_PREFILL_LENGTHS = 10
_MOST_ROWS = 256
_DRAFTED_STEPS = 6
"""Those of a shape, four at most, and the two for which SGLang allocates ahead."""


class ProfileLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What this engine can run in one step.

    Args:
        chunk_tokens: prompt tokens of a step.
        context_tokens: of one request.
        pool_tokens: of all requests together.
        rows: requests in the engine.
        step_tokens: tokens that a row computes in a decode step, drafts included: more than one
            with speculative decoding.
        mixes: whether prompts and rows that decode can share a step.
    """

    chunk_tokens: int
    context_tokens: int
    pool_tokens: int
    rows: int
    step_tokens: int = 1
    mixes: bool = True

    def fits(self, shape: StepShape) -> bool:
        """Whether `shape` can run here, with a page to spare for each of its rows."""
        longest = [*(new + resident for new, resident in shape.prompts), *shape.decode_contexts]
        parts = [*(new for new, _ in shape.prompts), *shape.decode_contexts]
        return (
            min(parts) > 0
            and (self.mixes or not (shape.prompts and shape.decode_contexts))
            and sum(new for new, _ in shape.prompts) <= self.chunk_tokens
            and max(longest) + shape.steps + self._drafts < self.context_tokens
            and sum(longest) + len(longest) * (shape.steps + 64 + self._drafts) <= self.pool_tokens
            and len(longest) <= self.rows
        )

    def times(self, shape: StepShape, at_most: int) -> int:
        """How often `shape`, which fits, can run with prompts of its own each time; at least once.

        The rows that decode are the same every time.
        """
        prompts = len(shape.prompts)
        if not prompts:
            return at_most
        tokens = sum(new + resident + 64 for new, resident in shape.prompts)
        rows = len(shape.decode_contexts)
        context = sum(shape.decode_contexts) + rows * (at_most + 64 + self._drafts)
        room = min((self.pool_tokens - context) // tokens, (self.rows - rows) // prompts)
        return max(min(room, at_most), 1)

    @property
    def _drafts(self) -> int:
        """KV that SGLang may set aside for the drafts of a row, in all steps of a shape."""
        return _DRAFTED_STEPS * (self.step_tokens - 1)


class StepShape(msgspec.Struct, frozen=True, kw_only=True):
    """A step to run: prompts as (new, resident) tokens, and the contexts of decode rows.

    A shape of decode rows alone runs `steps` times, over contexts that grow by one.
    """

    prompts: tuple[tuple[int, int], ...] = ()
    decode_contexts: tuple[int, ...] = ()
    steps: int = 1

    @property
    def work(self) -> StepWork:
        """Of the first step."""
        return StepWork.of(self.prompts, (context + 1 for context in self.decode_contexts))


def plan_profile(limits: ProfileLimits) -> list[StepShape]:
    """The shapes to measure, in an order in which any beginning is a fair sample of the whole."""
    shapes = {s: None for s in _shapes(limits) if limits.fits(s)}  # a set that keeps the order
    plan = list(shapes)
    random.Random(0).shuffle(plan)
    return plan


def plan_grid(limits: ProfileLimits) -> list[StepShape]:
    """A denser grid than a profile's: what a simulated device is interpolated from."""
    return [shape for shape in dict.fromkeys(_grid()) if limits.fits(shape)]


def _grid() -> Iterator[StepShape]:
    rows = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
    lengths = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
    for context in (256, 1024, 4096):
        for count in rows:
            yield StepShape(decode_contexts=(context,) * count, steps=3)
    for resident in (0, 1024, 4096):
        for new in lengths:
            yield StepShape(prompts=((new, resident),))
    for prompts in (2, 4, 8, 16):
        for new in (32, 64, 128, 256, 512):
            yield StepShape(prompts=((new, 1024),) * prompts)
    for count in (1, 4, 8, 16, 32, 64, 96, 128, 192):
        for new in (32, 64, 128, 256, 512, 1024, 2048):
            yield StepShape(prompts=((new, 1024),), decode_contexts=(1024,) * count)
    for count in (8, 64, 128):
        for new in (64, 256, 1024):
            yield StepShape(prompts=((new, 0),), decode_contexts=(256,) * count)
            yield StepShape(prompts=((new // 4, 1024),) * 4, decode_contexts=(1024,) * count)


def _shapes(limits: ProfileLimits) -> Iterator[StepShape]:
    chunk = min(limits.chunk_tokens, limits.context_tokens // 2, limits.pool_tokens // 2)
    yield from _prefills(chunk)
    yield from _decodes(chunk, min(limits.rows, _MOST_ROWS))
    yield from _mixed(chunk, min(limits.rows // 2, _MOST_ROWS))


def _prefills(chunk: int) -> Iterator[StepShape]:
    lengths = _log_spaced(_SHORTEST_PROMPT, chunk, _PREFILL_LENGTHS)
    for resident, some in ((0, lengths), (chunk, lengths[::2]), (4 * chunk, lengths[1::3])):
        for new in some:
            yield StepShape(prompts=((new, resident),))
    for prompts, new in ((2, chunk // 4), (4, chunk // 8), (8, _SHORTEST_PROMPT)):
        yield StepShape(prompts=((new, 0),) * prompts)
        yield StepShape(prompts=((new, chunk // 4),) * prompts)


def _decodes(chunk: int, most_rows: int) -> Iterator[StepShape]:
    for context in (chunk // 16, chunk // 2, 2 * chunk):
        for rows in _row_counts(most_rows):
            yield StepShape(decode_contexts=(context,) * rows, steps=3)


def _mixed(chunk: int, most_rows: int) -> Iterator[StepShape]:
    for rows in sorted({1, 4, 16, most_rows}):
        for new, resident in ((chunk // 16, 0), (chunk // 8, chunk), (chunk // 2, 0)):
            for context in (chunk // 8, chunk):
                yield StepShape(prompts=((new, resident),), decode_contexts=(context,) * rows)


def _row_counts(most: int) -> list[int]:
    return sorted({*(1 << i for i in range(most.bit_length())), 3, 6, 12, most} - {0})


def _log_spaced(low: int, high: int, n: int) -> list[int]:
    ratio = (max(high, low) / low) ** (1 / (n - 1))
    return sorted({min(round(low * ratio**i), high) for i in range(n)})
