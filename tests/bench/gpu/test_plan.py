"""Which parts fit."""

from __future__ import annotations

import math

from conserve_sgl.bench.gpu.parts import PARTS, Part, part_named
from conserve_sgl.bench.gpu.plan import END_S, plan


def part(name: str, least_s: float, wants_s: float) -> Part:
    return Part(
        name=name, about="a part", least_s=least_s, wants_s=wants_s, commands=lambda *_: iter(())
    )


def names(planned) -> list[str]:
    return [each.part.name for each in planned]


def test_parts_follow_each_other_in_their_order():
    first, second = plan([part("a", 10, 20), part("b", 10, 30)], 1000)
    assert (first.part.name, first.starts_s) == ("a", 0)
    assert (second.part.name, second.starts_s) == ("b", 20)


def test_a_part_that_hangs_does_not_take_the_time_of_all_others():
    (only,) = plan([part("a", 10, 20)], 1000)
    assert 20 < only.limit_s < 60


def test_a_part_gets_what_is_left_if_that_is_enough_for_some_of_it():
    (only,) = plan([part("a", 10, 300)], 100 + END_S)
    assert only.limit_s == 100


def test_what_does_not_fit_gives_its_place_to_what_does():
    parts = [part("a", 10, 20), part("large", 90, 100), part("small", 10, 20)]
    assert names(plan(parts, 60 + END_S)) == ["a", "small"]


def test_the_end_is_kept_for_the_last_archives():
    assert plan([part("a", 10, 20)], 9 + END_S) == []


def test_eight_minutes_hold_the_main_table():
    planned = plan(PARTS, 480)
    assert names(planned) == ["check", "stock", "conserve"]
    assert planned[-1].starts_s + planned[-1].limit_s <= 480 - END_S


def test_with_a_backend_that_is_known_they_hold_some_of_the_dial_too():
    last = plan(PARTS[1:], 480)[-1]
    assert last.part.name == "conserve"
    assert last.limit_s >= last.part.least_s + 3 * 30


def test_a_second_call_goes_on_with_the_costs_and_the_stock_variants():
    rest = [part for part in PARTS if part.name not in ("check", "stock", "conserve")]
    planned = names(plan(rest, 480))
    assert planned[:2] == ["yields", "resume"]
    assert len(planned) >= 4


def test_without_a_limit_every_part_is_planned():
    assert names(plan(PARTS, math.inf)) == [part.name for part in PARTS]


def test_every_part_can_be_named_once():
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(part_named(part.name) is part for part in PARTS)
    assert all(part.least_s <= part.wants_s < part.limit_s for part in PARTS)
