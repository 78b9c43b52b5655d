"""The ceiling against every schedule of a tiny engine, and its shape."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import inf
from typing import NamedTuple

import pytest

from conserve_sgl.policy import StepWork
from conserve_sgl.simulate.ceiling import BacklogMean, Ceiling, OnlineRequest, Room, ceiling

PROMPT, ANSWER, ROWS = 4, 3, 3
"""Of an offline request; rows of the tiny engine. It computes a prompt in one step, or in two."""


def linear_s(step: float, token: float, row: float, mixed: float):
    def seconds(work: StepWork) -> float:
        rows = (row + (mixed if work.prefill_tokens else 0.0)) * work.decode_rows
        return step + token * work.prefill_tokens + rows

    return seconds


class State(NamedTuple):
    """Of a request: prompt tokens computed, tokens got, and when the first came. Of the backlog:
    tokens that each resident request lacks, and tokens computed of the next prompt."""

    now_s: float
    online: tuple[tuple[int, int, float], ...]
    answers: tuple[int, ...] = ()
    computed: int = 0


class TinyEngine:
    """Tries every schedule: in each step some rows decode and some prompt tokens are computed."""

    def __init__(self, seconds, online, *, window_s, ttft_s, tpot_s):
        self.seconds, self.online, self.window_s = seconds, online, window_s
        self.ttft_s, self.tpot_s = ttft_s, tpot_s
        self.best = cache(self._best)

    def best_tokens(self) -> float:
        """The most offline tokens of any schedule that serves the online requests in time."""
        return self.best(State(0.0, tuple((0, 0, 0.0) for _ in self.online)))

    def _best(self, at: State) -> float:
        due_s = min(map(self._due_s, self.online, at.online), default=inf)
        if at.now_s > due_s + 1e-9:
            return -inf
        found = 0.0 if due_s > self.window_s else -inf
        for gained, then in self._steps(at):
            if then.now_s <= self.window_s:
                found = max(found, gained + self.best(then))
        for arrival in self.online:
            if at.now_s < arrival.at_s:
                found = max(found, self.best(at._replace(now_s=arrival.at_s)))
        return found

    def _due_s(self, request: OnlineRequest, state: tuple[int, int, float]) -> float:
        _, tokens, first_s = state
        if not tokens:
            return request.at_s + self.ttft_s
        if tokens < request.output_tokens:
            return first_s + (request.output_tokens - 1) * self.tpot_s
        return inf

    def _steps(self, at: State) -> Iterator[tuple[int, State]]:
        both = list(enumerate(zip(self.online, at.online, strict=True)))
        rows = [i for i, (r, (_, got, _)) in both if 0 < got < r.output_tokens]
        waiting = [i for i, (r, (done, _, _)) in both if r.at_s <= at.now_s and not done]
        prompts: list[tuple[int, int | None]] = [(0, None), *((0, i) for i in waiting)]
        if len(at.answers) + len(rows) < ROWS:
            prompts += [(n, None) for n in (PROMPT // 2, PROMPT) if at.computed + n <= PROMPT]
        for (tokens, prompt), some in product(prompts, (rows, []) if rows else ([],)):
            for offline_rows in range(len(at.answers) + 1):
                if tokens or prompt is not None or some or offline_rows:
                    yield self._after(at, tokens, prompt, some, offline_rows)

    def _after(
        self, at: State, tokens: int, prompt: int | None, rows: list[int], offline_rows: int
    ) -> tuple[int, State]:
        new = tokens + (0 if prompt is None else self.online[prompt].prompt_tokens)
        seconds = self.seconds(StepWork(new, 0.0, len(rows) + offline_rows, 0, int(new > 0)))
        now_s = round(at.now_s + seconds, 6)
        online = [list(state) for state in at.online]
        for i in rows:
            online[i][1] += 1
        if prompt is not None:
            online[prompt] = [self.online[prompt].prompt_tokens, 1, now_s]
        longest = sorted(at.answers, reverse=True)
        answers = [n - 1 for n in longest[:offline_rows]] + longest[offline_rows:]
        computed, gained = at.computed + tokens, tokens + offline_rows
        if computed == PROMPT:
            computed, gained = 0, gained + 1
            answers.append(ANSWER - 1)
        left = tuple(sorted(n for n in answers if n))
        return gained, State(now_s, tuple(map(tuple, online)), left, computed)


DEVICES = {
    "mixing is free": linear_s(1.0, 0.125, 0.125, 0.0),
    "mixing is dear": linear_s(1.0, 0.125, 0.125, 0.75),
    "prompts are dear": linear_s(0.5, 0.5, 0.25, 0.25),
}
STREAMS = {
    "nobody": (),
    "one": (OnlineRequest(1.0, 2, 4),),
    "two": (OnlineRequest(0.0, 2, 3), OnlineRequest(4.0, 2, 2)),
}


ROOM = Room(chunk_tokens=PROMPT, rows=ROWS, offline_rows=ROWS, kv_tokens=1000)
BACKLOG = BacklogMean.of([(0, PROMPT, ANSWER)])


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("seconds", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(("ttft_s", "tpot_s"), [(3.0, 2.0), (5.0, 3.0)])
def test_no_schedule_does_more(seconds, stream, ttft_s, tpot_s):
    objectives = {"window_s": 9.0, "ttft_s": ttft_s, "tpot_s": tpot_s}
    best = TinyEngine(seconds, stream, **objectives).best_tokens()
    bound = ceiling(seconds, stream, BACKLOG, ROOM, **objectives, slack_requests=ROWS, bins=18)
    assert not bound.unmet
    assert 0 < best <= 9.0 * bound.tok_s + 1e-6
    assert 9.0 * bound.tok_s <= 2.2 * best  # and it says something


REAL = linear_s(6e-3, 2.5e-5, 5e-5, 0.0)
BIG = Room(chunk_tokens=4096, rows=256, offline_rows=192, kv_tokens=10**9)
EVALS = BacklogMean.of([(1024, 600, 220)])
STREAM = tuple(OnlineRequest(0.4 * i, 1000, 200) for i in range(40))


def bound_of(tpot_s: float, ttft_s: float = 0.5, stream=STREAM) -> Ceiling:
    return ceiling(REAL, stream, EVALS, BIG, window_s=20.0, ttft_s=ttft_s, tpot_s=tpot_s, bins=20)


def test_it_grows_with_the_objective_up_to_what_offline_work_does_alone():
    alone = bound_of(inf, stream=()).tok_s
    bounds = [bound_of(tpot_s).tok_s for tpot_s in (0.008, 0.015, 0.05)]
    assert bounds == sorted(bounds)
    assert 0 < bounds[0] < 0.75 * alone
    assert 0.8 * alone < bounds[-1] < alone


def test_rows_beside_prompts_at_no_cost_let_a_step_do_both():
    dear = ceiling(linear_s(6e-3, 2.5e-5, 5e-5, 1e-3), STREAM, EVALS, BIG, window_s=20.0, bins=10)
    free = ceiling(REAL, STREAM, EVALS, BIG, window_s=20.0, bins=10)
    assert free.tok_s > 1.02 * dear.tok_s


def test_what_the_host_launches_takes_its_time_too():
    slow_host = ceiling(REAL, (), EVALS, BIG, window_s=20.0, launch_s=lambda _: 0.05)
    assert slow_host.tok_s < bound_of(inf, stream=()).tok_s


def test_objectives_that_nothing_meets_are_told_in_a_sentence():
    tpot = bound_of(0.005)
    assert "a decode step of one row takes 6.0 ms" in tpot.unmet[0] or "6.1 ms" in tpot.unmet[0]
    ttft = bound_of(0.05, ttft_s=0.02)
    assert (
        "40 of 40 prompts take longer than the objective for the first token, 20 ms"
        in (ttft.unmet[0])
    )


def test_more_online_work_than_time_leaves_no_room_and_says_so():
    flood = tuple(OnlineRequest(0.01 * i, 4000, 50) for i in range(1000))
    bound = bound_of(0.02, stream=flood)
    assert bound.tok_s == 0
    assert "more work than the device does in time" in bound.unmet[0]


def test_a_mean_request_weighs_steps_not_requests():
    mean = BacklogMean.of([(100, 10, 1), (100, 10, 99)], repeated_read=0.5)
    assert mean.output_tokens == 50
    assert mean.held_tokens == pytest.approx((11 + 60 * 99) / 100)
    assert mean.context_tokens == pytest.approx(50 + mean.held_tokens)
