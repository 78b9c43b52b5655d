"""The offline tokens/s that no scheduler could exceed: same objectives, step times and load.

A linear program over a relaxed engine. Time is cut into bins. In each, the program chooses how many
steps of every shape (prompt tokens, decode rows) run; a shape costs what the device's table says,
without noise and without host time. What any schedule does in the window is one such choice, so the
program's optimum is at least as good, wherever a schedule's own shapes cost no less than a mixture
of the grid's: the grid holds every graph size.

    maximise    offline prompt tokens + offline decode tokens
    time        of a bin's steps and of the online prefills in it: at most the bin; and what
                launching the steps takes the host, too
    rows        every step's rows are online or offline; an online request gets at most one token
                from a step, told apart by how many rows the step has; offline rows are at most what
                is in flight, and what the KV pool holds of the rows' mean context
    TTFT        an online prompt is computed between its arrival and its objective, at the least
                time that it takes on the device: alone, its share of a batch of such prompts, or
                riding with rows, whichever is least
    TPOT        the n - 1 tokens after the first come between arrival and
                arrival + TTFT + (n - 1) TPOT
    backlog     prompts and answers in the backlog's own proportion: the long run. A window may
                hold `slack_requests` more of either

Bins are widened outwards, never inwards, a request may be computed in parts, and nobody has to know
the future: all of that only makes the optimum better. An online request that cannot be in time by
itself is computed nevertheless, whenever it suits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor, inf

import msgspec
import numpy as np

from conserve_sgl.policy import StepWork

__all__ = ["BacklogMean", "Ceiling", "OnlineRequest", "Room", "ceiling"]

MeanTime = Callable[[StepWork], float]

_BIN_S, _MOST_BINS = 0.75, 60
"""Of a window: the program then takes some seconds. Longer bins only loosen the bound."""

_LEVEL_ROWS = 32


class OnlineRequest(msgspec.Struct, frozen=True):
    """An online request; `cached_tokens` of its prompt need not be computed."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0


class BacklogMean(msgspec.Struct, frozen=True, kw_only=True):
    """A mean request of the backlog.

    Args:
        new_tokens: of its prompt, that are not cached.
        resident_tokens: of its prompt, that are.
        output_tokens: of its answer.
        context_tokens: that its rows attend to, in the mean over their steps.
        held_tokens: KV of its own in the mean over its steps, shared blocks left out.
    """

    new_tokens: float
    resident_tokens: float
    output_tokens: float
    context_tokens: float
    held_tokens: float

    @classmethod
    def of(
        cls, requests: Iterable[tuple[int, int, int]], *, repeated_read: float = 1.0
    ) -> BacklogMean:
        """Of (cached, new, output) tokens of some requests; a step of a long answer counts as one
        of a short one. Of what is cached, a row reads so much as `repeated_read` says."""
        cached, new, output = np.array(list(requests), dtype=float).T
        middle = new + (output + 1) / 2
        steps = output.sum()
        return cls(
            new_tokens=float(new.mean()),
            resident_tokens=float((cached * new).sum() / new.sum()),
            output_tokens=float(output.mean()),
            context_tokens=float(((repeated_read * cached + middle) * output).sum() / steps),
            held_tokens=float((middle * output).sum() / steps),
        )


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine can hold.

    Args:
        chunk_tokens: prompt tokens of a step.
        rows: of a step.
        offline_rows: of these, for offline work: what is in flight at most.
        kv_tokens: of the pool, without the blocks that the backlog shares.
        graph_rows: batch sizes that cost no padding; the grid has them all.
    """

    chunk_tokens: int
    rows: int
    offline_rows: int
    kv_tokens: int
    graph_rows: tuple[int, ...] = ()


class Ceiling(msgspec.Struct, frozen=True):
    """The bound, and why there is none.

    Args:
        tok_s: offline tokens a second, prompts computed and answers; 0 where online requests alone
            do not fit.
        unmet: what cannot be met even without offline work, a sentence each.
    """

    tok_s: float
    unmet: tuple[str, ...] = ()


def ceiling(
    mean_s: MeanTime,
    online: Sequence[OnlineRequest],
    backlog: BacklogMean,
    room: Room,
    *,
    window_s: float,
    ttft_s: float = inf,
    tpot_s: float = inf,
    launch_s: MeanTime = lambda _: 0.0,
    slack_requests: float = 0.0,
    bins: int | None = None,
) -> Ceiling:
    """The bound for a window of `window_s` seconds; see the module's text.

    Args:
        mean_s: seconds of a step.
        online: the stream; arrivals after the window are left out.
        backlog: what the offline requests are like.
        room: what fits into a step and into the engine.
        ttft_s, tpot_s: the objectives.
        launch_s: seconds of the host to launch a step.
        slack_requests: requests by which the window's prompts and answers may be out of proportion.
        bins: that the window is cut into; as many as are good for it if not given.
    """
    bins = bins or min(ceil(window_s / _BIN_S), _MOST_BINS)
    shapes = list(_shapes(mean_s, launch_s, backlog, room))
    program = _Program(mean_s, shapes, backlog, room, window_s, bins if online else 1)
    unmet = _unmet(mean_s, online, room, ttft_s, tpot_s)
    for request in online:
        if request.at_s < window_s:
            program.add(request, ttft_s, tpot_s)
    tok_s = program.solve(slack_requests)
    if tok_s is None and not unmet:
        unmet = (
            "the online requests alone are more work than the device does in time: "
            "no schedule meets the objectives for all of them",
        )
    return Ceiling(tok_s or 0.0, unmet)


def _unmet(
    mean_s: MeanTime, online: Sequence[OnlineRequest], room: Room, ttft_s: float, tpot_s: float
) -> tuple[str, ...]:
    sentences = []
    step_s = mean_s(StepWork(decode_rows=1, decode_context=1))
    if any(r.output_tokens > 1 for r in online) and step_s > tpot_s:
        sentences.append(
            f"a decode step of one row takes {1e3 * step_s:.1f} ms here, longer than the objective "
            f"for the time per token, {1e3 * tpot_s:g} ms: no schedule meets it"
        )
    late = [r for r in online if _alone_s(mean_s, r, room) > ttft_s]
    if late:
        longest = max(late, key=lambda r: r.prompt_tokens - r.cached_tokens)
        longest_ms = 1e3 * _alone_s(mean_s, longest, room)
        sentences.append(
            f"{len(late)} of {len(online)} prompts take longer than the objective for the first "
            f"token, {1e3 * ttft_s:g} ms, even alone; the longest, {longest.prompt_tokens:,} "
            f"tokens, {longest_ms:,.0f} ms: no schedule meets it for them"
        )
    return tuple(sentences)


def _alone_s(mean_s: MeanTime, request: OnlineRequest, room: Room) -> float:
    """Seconds of the request's prompt on an idle engine."""
    seconds, done = 0.0, request.cached_tokens
    while done < request.prompt_tokens:
        new = min(room.chunk_tokens, request.prompt_tokens - done)
        seconds += mean_s(StepWork.of([(new, done)]))
        done += new
    return seconds


class _Shape(msgspec.Struct, frozen=True):
    prefill_tokens: int
    rows: int
    seconds: float
    launch_s: float


class _Program:
    """The linear program, column by column.

    Columns of a bin: steps of each shape; offline decode tokens, for each level of rows. Columns of
    a request: its tokens in each bin of its time and each level, the share of its prompt in each.
    """

    def __init__(
        self,
        mean_s: MeanTime,
        shapes: Sequence[_Shape],
        backlog: BacklogMean,
        room: Room,
        window_s: float,
        bins: int,
    ) -> None:
        self._mean_s, self._backlog, self._room = mean_s, backlog, room
        self._bins, self._bin_s = bins, window_s / bins
        self._window_s = window_s
        self._shapes = shapes
        self._context_s = _context_s(mean_s, backlog, room)
        self._levels = sorted({_level(shape.rows) for shape in shapes if shape.rows})
        self._columns = bins * len(shapes)
        self._cost = [0.0] * self._columns
        self._at_most: list[tuple[dict[int, float], float]] = []
        self._equal: list[tuple[dict[int, float], float]] = []
        self._time = [self._of_shapes(b, lambda shape: shape.seconds) for b in range(bins)]
        self._rows: dict[tuple[int, int], dict[int, float]] = {}
        self._offline: list[int] = []
        offline_rows = min(room.offline_rows, room.kv_tokens / backlog.held_tokens, room.rows)
        for b in range(bins):
            launches = self._of_shapes(b, lambda shape: shape.launch_s)
            self._at_most.append((launches, self._bin_s))
            for level in self._levels:
                self._add_level(b, level, offline_rows)

    def _add_level(self, b: int, level: int, offline_rows: float) -> None:
        column = self._column()
        self._offline.append(column)
        rows = self._of_shapes(b, lambda shape: -float(shape.rows), level)
        self._rows[b, level] = {**rows, column: 1.0}
        capped = self._of_shapes(b, lambda _: -offline_rows, level)
        self._at_most.append(({**capped, column: 1.0}, 0.0))

    def _of_shapes(
        self, b: int, value: Callable[[_Shape], float], level: int | None = None
    ) -> dict[int, float]:
        """What the steps of a bin sum up to, of one level of rows or of all."""
        first = b * len(self._shapes)
        chosen = (
            (i, shape)
            for i, shape in enumerate(self._shapes)
            if level is None or (shape.rows and _level(shape.rows) == level)
        )
        return {first + i: v for i, shape in chosen if (v := value(shape))}

    def _column(self) -> int:
        self._columns += 1
        self._cost.append(0.0)
        return self._columns - 1

    def add(self, request: OnlineRequest, ttft_s: float, tpot_s: float) -> None:
        """One online request, to be served in time."""
        tokens = request.output_tokens - 1
        prefill_s = _least_prefill_s(self._mean_s, request, self._room)
        in_time = _alone_s(self._mean_s, request, self._room) <= ttft_s
        first_s = request.at_s + ttft_s if in_time else inf
        parts = {}
        for b in self._bins_between(request.at_s, first_s):
            column = self._column()
            parts[column] = 1.0
            self._time[b][column] = prefill_s
        self._whole(parts, 1.0, inf if first_s > self._window_s else 0.0)
        if tokens > 0:
            step_s = min(shape.seconds for shape in self._shapes if shape.rows)
            last_s = first_s + tokens * max(tpot_s, step_s)
            after = max(last_s - self._window_s, 0.0) / step_s
            self._whole(self._tokens(request, last_s), float(tokens), after)

    def _tokens(self, request: OnlineRequest, last_s: float) -> dict[int, float]:
        """Columns of the tokens after the first: of a step at most one."""
        context = request.prompt_tokens + request.output_tokens / 2
        extra_s = self._context_s * (context - self._backlog.context_tokens)
        parts = {}
        for b, level in itertools.product(self._bins_between(request.at_s, last_s), self._levels):
            column = self._column()
            parts[column] = 1.0
            self._time[b][column] = extra_s
            self._rows[b, level][column] = 1.0
            steps = self._of_shapes(b, lambda _: -1.0, level)
            self._at_most.append(({**steps, column: 1.0}, 0.0))
        return parts

    def _bins_between(self, from_s: float, to_s: float) -> range:
        first = min(floor(from_s / self._bin_s), self._bins - 1)
        last = min(ceil(min(to_s, self._window_s) / self._bin_s), self._bins)
        return range(first, max(last, first + 1))

    def _whole(self, parts: dict[int, float], amount: float, after: float) -> None:
        """`parts` add up to `amount`, but for what may be done `after` the window."""
        if after:
            late = self._column()
            parts[late] = 1.0
            if after < amount:
                self._at_most.append(({late: 1.0}, after))
        self._equal.append((parts, amount))

    def solve(self, slack_requests: float) -> float | None:
        """Tokens a second; None where the online requests do not fit."""
        from scipy.optimize import linprog
        from scipy.sparse import csr_array

        self._at_most += [(row, self._bin_s) for row in self._time]
        self._at_most += [(row, 0.0) for row in self._rows.values()]
        self._keep_proportion(slack_requests)
        self._value()
        upper, upper_at = _matrix(self._at_most, self._columns, csr_array)
        equal, equal_at = _matrix(self._equal, self._columns, csr_array)
        found = linprog(
            self._cost,
            A_ub=upper,
            b_ub=upper_at,
            A_eq=equal if self._equal else None,
            b_eq=equal_at if self._equal else None,
            method="highs",
        )
        return None if found.status else -float(found.fun) / self._window_s

    def _keep_proportion(self, slack_requests: float) -> None:
        """Prompts over answers as in the backlog, in the whole window."""
        prompts: dict[int, float] = {}
        for b in range(self._bins):
            prompts |= self._of_shapes(b, lambda shape: float(shape.prefill_tokens))
        answers = dict.fromkeys(self._offline, 1.0)
        backlog = self._backlog
        # The first token of an answer comes with its prompt.
        decoded = max(backlog.output_tokens - 1, 1e-9)
        for sign in (1, -1):
            row = {column: sign * v / backlog.new_tokens for column, v in prompts.items()}
            row |= {column: -sign * v / decoded for column, v in answers.items()}
            self._at_most.append((row, slack_requests))

    def _value(self) -> None:
        of_prompt = 1.0 + 1.0 / self._backlog.new_tokens  # with the first token of the answer
        for b in range(self._bins):
            for column, tokens in self._of_shapes(b, lambda shape: shape.prefill_tokens).items():
                self._cost[column] = -of_prompt * tokens
        for column in self._offline:
            self._cost[column] = -1.0


def _matrix(rows: Sequence[tuple[dict[int, float], float]], columns: int, make: Callable) -> tuple:
    values = [v for row, _ in rows for v in row.values()]
    places = [c for row, _ in rows for c in row]
    ends = list(itertools.accumulate((len(row) for row, _ in rows), initial=0))
    matrix = make((values, places, ends), shape=(len(rows), columns))
    return matrix, [bound for _, bound in rows]


def _shapes(
    mean_s: MeanTime, launch_s: MeanTime, backlog: BacklogMean, room: Room
) -> Iterable[_Shape]:
    """The grid of steps: offline prompts of the mean length, and rows of the mean context."""
    rows_alone = [_shape(mean_s, launch_s, backlog, 0, rows) for rows in _row_counts(room) if rows]
    yield from rows_alone
    for tokens in _token_counts(room):
        alone = _shape(mean_s, launch_s, backlog, tokens, 0)
        least_launch_s = alone.launch_s
        for beside in rows_alone:
            mixed = _shape(mean_s, launch_s, backlog, tokens, beside.rows)
            if mixed.seconds < alone.seconds + beside.seconds:
                yield mixed
            else:
                # Two steps do the same, and sooner; let them be no more work for the host either.
                least_launch_s = min(least_launch_s, mixed.launch_s - beside.launch_s)
        yield msgspec.structs.replace(alone, launch_s=max(least_launch_s, 0.0))


def _shape(
    mean_s: MeanTime, launch_s: MeanTime, backlog: BacklogMean, tokens: int, rows: int
) -> _Shape:
    context = round(rows * backlog.context_tokens)
    work = StepWork.of(_prompts(tokens, backlog) if tokens else ())
    work = work.plus(StepWork(decode_rows=rows, decode_context=context))
    return _Shape(tokens, rows, mean_s(work), launch_s(work))


def _token_counts(room: Room) -> list[int]:
    doubling = [1 << i for i in range(5, room.chunk_tokens.bit_length())]
    counts = {room.chunk_tokens, *doubling, *(3 * n // 2 for n in doubling if 64 <= n <= 512)}
    return sorted(n for n in counts if n <= room.chunk_tokens)


def _row_counts(room: Room) -> list[int]:
    graphs = [rows for rows in room.graph_rows if rows <= room.rows]
    some = graphs or range(min(room.rows, 8) + 1)
    return sorted({1, *(rows for rows in some if _is_kept(rows)), room.rows})


def _is_kept(rows: int) -> bool:
    return rows <= 16 or (rows <= 64 and not rows % 16) or not rows % 32


def _level(rows: int) -> int:
    """Steps of so many rows and of a few more are one level: beyond it, every online request finds
    a row in each."""
    return min(rows, _LEVEL_ROWS)


def _prompts(tokens: int, backlog: BacklogMean) -> list[tuple[int, int]]:
    """So many new tokens, as mean prompts."""
    resident = round(backlog.resident_tokens)
    count = max(round(tokens / backlog.new_tokens), 1)
    sizes = [tokens // count + (i < tokens % count) for i in range(count)]
    return [(size, resident) for size in sizes if size]


def _context_s(mean_s: MeanTime, backlog: BacklogMean, room: Room) -> float:
    """Seconds that a token of context costs a row, where most rows run."""
    rows = max(min(room.offline_rows, room.rows) // 2, 1)
    context = rows * max(backlog.context_tokens, 1.0)
    low, high = (
        mean_s(StepWork(decode_rows=rows, decode_context=round(context * f))) for f in (0.8, 1.2)
    )
    return max(high - low, 0.0) / (0.4 * context)


def _least_prefill_s(mean_s: MeanTime, request: OnlineRequest, room: Room) -> float:
    """The least device time that the prompt costs, however it is batched."""
    least_s, done = 0.0, request.cached_tokens
    while done < request.prompt_tokens:
        new = min(room.chunk_tokens, request.prompt_tokens - done)
        least_s += min(_costs_of_chunk(mean_s, new, done, room))
        done += new
    return least_s


def _costs_of_chunk(mean_s: MeanTime, new: int, done: int, room: Room) -> Iterable[float]:
    most = max(room.chunk_tokens // new, 1)
    for count in {1, min(2, most), min(4, most), most}:
        yield mean_s(StepWork.of([(new, done)] * count)) / count
    for rows in {1, min(16, room.rows), min(128, room.rows)}:
        decode = StepWork(decode_rows=rows, decode_context=rows * (done + new))
        yield max(mean_s(decode.plus_prompt(new, done)) - mean_s(decode), 0.0)
