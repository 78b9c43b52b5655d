"""The sentence: every bound has one, with the numbers that say so."""

from __future__ import annotations

import pytest

from conserve_sgl.policy import Bound
from conserve_sgl.status.why import why
from status.examples import KV, MODEL, OFFLINE, ONLINE, SERVER, SETTINGS, changed


def said(bound: Bound, **parts: dict[str, object]) -> str:
    known = {
        "server": SERVER,
        "settings": SETTINGS,
        "online": ONLINE,
        "offline": OFFLINE,
        "kv": KV,
        "model": MODEL,
    }
    for name, fields in parts.items():
        known[name] = changed(known[name], **fields)
    return why(bound, {bound: 9.0}, **known).text


NO_WORK = {"rows": 0, "parked": 0, "waiting": 0}
COUNTS = " Of offline requests 40 run, 8 sit out, 144 wait."


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        (
            Bound.ONLINE_PROMPTS,
            "Online prompts go first, and no offline work beside them (1 of them now).",
        ),
        (
            Bound.ARRIVAL,
            "Online requests are on their way: nothing offline starts before their prompts.",
        ),
        (
            Bound.TTFT,
            "A longer step would keep an online arrival waiting beyond slo.ttft (500ms); a larger "
            "one makes room.",
        ),
        (
            Bound.TPOT,
            "The 12 online rows leave no more time within slo.tpot (25ms); a larger one makes "
            "room.",
        ),
        (
            Bound.GAP,
            "A longer step would be a gap that readers notice: slo.longest_gap (by default twice "
            "slo.tpot, at least 50ms).",
        ),
        (
            Bound.YIELD,
            "Offline work runs alone, in steps that slo.yield_ms (5 ms) keeps short for who may "
            "come.",
        ),
        (
            Bound.ROWS,
            "No row is free: 12 online and 48 offline, of 256 and at most 224; a larger "
            "--max-running-requests makes room.",
        ),
        (
            Bound.KV,
            "The KV pool is full: 500 of 1,000 tokens are left, 150 reserved to online requests "
            "(memory.online_reserve).",
        ),
        (
            Bound.DEVICE,
            "The device itself: offline work has all that online requests leave of it.",
        ),
        (Bound.PAUSED, "Offline work is paused until `conserve tune --offline run`."),
        (Bound.ENDING, "The server ends: offline requests are answered 503."),
    ],
)
def test_a_bound_says_why_and_what_would_make_room(bound, text):
    assert said(bound) == text + COUNTS


def test_nothing_waits_where_all_runs_and_where_there_is_nothing():
    assert said(Bound.NOTHING, offline=NO_WORK) == ("Nothing waits: there is no offline work here.")
    assert said(Bound.NOTHING, offline={"waiting": 0}) == (
        "Nothing waits: all offline work that is here runs."
    )


def test_every_bound_has_a_sentence():
    for bound in Bound:
        text = said(bound)
        assert text[0].isupper()
        assert text.endswith(".")
        assert "None" not in text


def test_one_row_is_one_row():
    assert said(Bound.TPOT, online={"rows": 1}).startswith("The online row leaves no more time")


def test_outcomes_that_took_the_margin_are_named():
    text = "Late requests have taken offline work's part of that time to 60%."
    assert text in said(Bound.TPOT, online={"margins": {"ttft": 1.0, "tpot": 0.6}})
    assert text in said(Bound.TTFT, online={"margins": {"ttft": 0.6, "tpot": 0.9}})
    assert text not in said(Bound.TTFT, online={"margins": {"ttft": 1.0, "tpot": 0.6}})
    assert text not in said(Bound.KV, online={"margins": {"ttft": 0.6, "tpot": 0.6}})


def test_what_it_gets_in_any_case_is_named_where_time_is_short():
    text = "offline.min_share gives it 5% of the time in any case."
    assert text in said(Bound.TPOT, settings={"min_share": 0.05})
    assert text not in said(Bound.ROWS, settings={"min_share": 0.05})


def test_work_that_gets_nothing_is_named():
    assert "None has run for 12 s." in said(Bound.KV, offline={"starved_s": 12.4})
    assert "None has run" not in said(Bound.PAUSED, offline={"starved_s": 12.4})
    assert "None has run" not in said(Bound.KV, offline={"starved_s": 0.5})


@pytest.mark.parametrize(("bias", "way"), [(0.14, "14% longer"), (-0.2, "20% shorter")])
def test_a_model_that_is_unsure_says_so(bias, way):
    text = said(Bound.TPOT, model={"bias": bias, "is_biased": True})
    assert f"The latency model is unsure: steps take {way} than it says" in text
    assert "unsure" not in said(Bound.TPOT, model={"bias": bias})


def test_batches_that_are_held_are_named():
    text = said(Bound.NOTHING, offline=NO_WORK, settings={"batches": "hold"})
    assert text.endswith("Batches are held until `conserve tune --batches run`.")


def test_the_seconds_of_each_bound_are_told_by_its_word():
    known = {"server": SERVER, "settings": SETTINGS, "online": ONLINE, "offline": OFFLINE}
    found = why(Bound.KV, {Bound.KV: 8.0, Bound.TPOT: 2.0}, **known, kv=KV, model=MODEL)
    assert found.bound == "kv"
    assert found.seconds == {"kv": 8.0, "slo.tpot": 2.0}
