"""Who gives way: tables of candidates and victims."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy.victims import Candidate, choose_victims


def candidates(*rows: tuple[int, int, bool]) -> list[Candidate]:
    return [
        Candidate(index=i, total_tokens=total, checkpointed_tokens=kept, is_running=running)
        for i, (total, kept, running) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "needed", "victims"),
    [
        pytest.param([], 5, [], id="nobody is there"),
        pytest.param([(10, 10, True)], 0, [], id="nothing is needed"),
        pytest.param([(10, 0, True), (10, 5, True)], 1, [1], id="least to compute again"),
        pytest.param([(90, 80, True), (9, 0, True)], 1, [1], id="in tokens, not in shares"),
        pytest.param([(10, 8, True), (10, 8, False)], 1, [1], id="sitting out before running"),
        pytest.param([(10, 9, True), (10, 8, False)], 1, [0], id="but the loss counts first"),
        pytest.param([(10, 10, True), (90, 90, True)], 1, [1], id="then the one that frees most"),
        pytest.param([(10, 10, True), (10, 10, True)], 1, [1], id="then the newest"),
        pytest.param([(10, 9, True), (20, 19, True)], 25, [1, 0], id="until it is enough"),
        pytest.param([(10, 9, True), (20, 19, True)], 99, [1, 0], id="all, if it never is"),
    ],
)
def test_who_gives_way(rows, needed, victims):
    assert [v.index for v in choose_victims(candidates(*rows), needed)] == victims


def test_more_cannot_be_kept_than_is_held():
    with pytest.raises(ValueError, match="part of what is held"):
        Candidate(index=0, total_tokens=3, checkpointed_tokens=4)


ROWS = st.tuples(st.integers(0, 50), st.integers(0, 50), st.booleans()).map(
    lambda row: (max(row[:2]), min(row[:2]), row[2])
)


@given(st.lists(ROWS, max_size=12), st.integers(0, 400))
def test_victims_free_what_is_needed_and_no_one_gives_way_in_vain(rows, needed):
    victims = choose_victims(candidates(*rows), needed)
    freed = [v.total_tokens for v in victims]
    assert sum(freed) >= needed or len(victims) == len(rows)
    assert sum(freed[:-1]) < needed or not victims
    lost = [v.lost_tokens for v in victims]
    spared = [c.lost_tokens for c in candidates(*rows) if c not in victims]
    assert not lost or not spared or max(lost) <= min(spared)
