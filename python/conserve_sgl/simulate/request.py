"""A request in the simulator, and a batch of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from conserve_sgl.bench.load.backlog import STREAM_INTERVAL
from conserve_sgl.bench.load.record import UNFINISHED, RequestRecord
from conserve_sgl.policy import StepWork

__all__ = ["Batch", "Chunk", "Request"]


@dataclass(slots=True, eq=False)
class Request:
    """One request; what it is first, then how far it is. Times are seconds after the stream began.

    Attributes:
        blocks: names of the prompt's first blocks, of `block_tokens` each; equal names, equal KV.
        resident: tokens of it that have KV, blocks that it shares included.
        shared: of these, tokens in blocks.
        launched, read: tokens of the answer whose step was launched, and whose result was handled.
        epoch: how often it gave way: results of steps before are not its any more.
        checkpointed: tokens whose KV outlived giving way, on the host.
        cached: prompt tokens that were found when it was first admitted.
        ready_s: when what it has on the host is on the device; 0 while no copy was begun.
    """

    online: bool
    due_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[Hashable] = ()
    block_tokens: int = 0

    resident: int = 0
    shared: int = 0
    launched: int = 0
    read: int = 0
    epoch: int = 0
    checkpointed: int = 0
    cached: int = 0
    ready_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)

    @property
    def fill_tokens(self) -> int:
        """Tokens that a prefill has to bring to KV: the prompt, and what was answered before the
        request gave way."""
        return self.prompt_tokens + self.read

    @property
    def context(self) -> int:
        """Tokens that its next decode step attends to."""
        return self.prompt_tokens + self.launched

    @property
    def left(self) -> int:
        """Tokens of the answer that are still to be launched."""
        return self.output_tokens - self.launched

    @property
    def finished(self) -> bool:
        return self.read >= self.output_tokens

    @property
    def first_s(self) -> float:
        """When its first token was handled; to be asked once there is one."""
        return self.token_times_s[0]

    def record(self, egress_s: float = 0.0) -> RequestRecord:
        """What a client saw of it, `egress_s` after the steps that brought its tokens."""
        times = [time_s + egress_s for time_s in self.token_times_s]
        step = 1 if self.online else STREAM_INTERVAL
        ends = list(range(step, len(times) + 1, step))
        if len(times) % step and self.finished:
            ends.append(len(times))
        ends = [1, *ends] if step > 1 and times else ends
        return RequestRecord(
            class_="online" if self.online else "offline",
            due_s=self.due_s,
            sent_s=self.due_s,
            done_s=times[-1] if self.finished else None,
            chunk_times_s=tuple(times[end - 1] for end in ends),
            chunk_tokens=tuple(b - a for a, b in zip([0, *ends], ends, strict=False)),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached,
            error=None if self.finished else UNFINISHED,
        )


@dataclass(slots=True, eq=False)
class Chunk:
    """Prompt tokens of one request in a batch; `last` brings its next token."""

    request: Request
    new: int
    resident: int
    last: bool
    epoch: int


@dataclass(slots=True, eq=False)
class Batch:
    """What one step computes, and when.

    Attributes:
        rows: requests that decode in it, with their epoch.
        planned_s: when it was formed. began_s, ends_s: on the device.
        layers: computed of a prefill that runs in layer slices.
        learned: whether its time says what a step of `work` takes.
    """

    chunks: list[Chunk]
    rows: list[tuple[Request, int]]
    work: StepWork
    planned_s: float
    began_s: float = 0.0
    ends_s: float = 0.0
    layers: int = 0
    learned: bool = True

    @classmethod
    def of(cls, chunks: list[Chunk], rows: Sequence[Request], now_s: float) -> Batch:
        """Formed now; the chunks' tokens count as computed, and every row gets a token."""
        work = StepWork.of(
            [(chunk.new, chunk.resident) for chunk in chunks],
            [row.prompt_tokens + row.launched for row in rows],
        )
        for chunk in chunks:
            chunk.request.launched += chunk.last
        for row in rows:
            row.launched += 1
        return cls(chunks, [(row, row.epoch) for row in rows], work, now_s)

    @property
    def repeated_context(self) -> int:
        """Tokens of the rows' contexts in blocks that a row before them holds too."""
        seen: set[Hashable] = set()
        repeated = 0
        for row, _ in self.rows:
            if not row.block_tokens:
                continue
            for key in row.blocks[: row.shared // row.block_tokens]:
                if key in seen:
                    repeated += row.block_tokens
                seen.add(key)
        return repeated
