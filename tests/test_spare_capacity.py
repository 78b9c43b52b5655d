"""What offline work an engine would take, from its accounts."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from conserve_sgl.engine.spare import SpareCapacity
from conserve_sgl.policy import Rows, StepView


class Sent(list):
    """Stands where the sender does."""

    def send(self, requests: int, *, held: bool) -> None:
        self.append((requests, held))


def ledger(**counts: int) -> Any:
    tokens = Counter(computed=0, cached=0, output=0)
    return SimpleNamespace(tokens=tokens, counts=Counter(offline_finished=0, **counts))


def view(rows: int = 0) -> StepView:
    return StepView(now_s=0.0, offline_decoding=Rows(rows, 100 * rows), max_rows=8)


def test_it_looks_once_a_second_and_tells_the_http_process():
    sent = Sent()
    spare = SpareCapacity(ledger(), sent)
    for ms in range(0, 2500, 10):
        spare.step(50 + ms / 1000, view(rows=3), waiting=0, held=False)
    assert sent == [(9, False)] * 3


def test_a_pause_is_told_at_once_and_so_is_its_end():
    sent = Sent()
    spare = SpareCapacity(ledger(), sent)
    for ms, held in ((0, False), (10, True), (20, True), (30, False), (40, False)):
        spare.step(50 + ms / 1000, view(rows=3), waiting=0, held=held)
    assert sent == [(9, False), (0, True), (9, False)]


def test_other_ranks_tell_nobody():
    spare = SpareCapacity(ledger(), None)
    spare.step(50.0, view(), waiting=0, held=False)
    assert spare.state(50.0) == {"requests": 12, "tokens_per_s": None, "age_s": None}


def test_what_was_cached_cost_nothing_and_does_not_count():
    accounts = ledger()
    spare = SpareCapacity(accounts, None)
    spare.step(50.0, view(rows=8), waiting=3, held=False)
    accounts.tokens.update(computed=60, cached=10_000, output=40)
    spare.step(51.0, view(rows=8), waiting=3, held=False)
    spare.step(52.0, view(rows=8), waiting=3, held=True)
    accounts.tokens.update(computed=60)
    state = spare.state(54.0)
    assert state["requests"] == 0
    assert state["age_s"] == 3.0
    assert state["tokens_per_s"] <= 100
