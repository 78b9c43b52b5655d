"""What the fixed cap grants in a step: one row a situation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy import FixedCap, StepPlan, StepView

CAP, RESIDENT, BESIDE, RESERVE = 512, 64, 16, 0.25
POOL = 10_000


def policy() -> FixedCap:
    return FixedCap(
        step_tokens=CAP, resident_rows=RESIDENT, rows_beside_online=BESIDE, kv_reserve=RESERVE
    )


def plan(**seen: Any) -> StepPlan:
    """The plan for a roomy engine with a backlog, in which `seen` is different."""
    roomy = {
        "offline_waiting": 1000,
        "free_rows": 1000,
        "free_kv_tokens": POOL,
        "total_kv_tokens": POOL,
        "chunk_tokens": 1024,
    }
    return policy().plan(StepView(now_s=0.0, **{**roomy, **seen}))


@pytest.mark.parametrize(
    ("seen", "tokens"),
    [
        pytest.param({}, CAP, id="an idle engine: the whole step"),
        pytest.param({"offline_decoding": 40}, CAP, id="offline rows cost offline nothing"),
        pytest.param({"chunk_tokens": 100}, 100, id="never more than the engine's own chunk"),
        pytest.param({"online_arriving": 1}, 0, id="nothing while an online request arrives"),
        pytest.param(
            {"online_waiting": 1, "online_waiting_tokens": 200},
            CAP - 200,
            id="a waiting online prompt is subtracted",
        ),
        pytest.param(
            {"online_waiting": 1, "online_waiting_tokens": CAP},
            0,
            id="an online prompt of the step's size leaves nothing",
        ),
        pytest.param(
            {"online_waiting": 9, "online_waiting_tokens": 9000},
            0,
            id="more online prompts than fit leave nothing, not less",
        ),
        pytest.param({"online_decoding": 12}, CAP - 12, id="every online row takes one token"),
        pytest.param(
            {"online_decoding": 12, "rows_decoded": False},
            0,
            id="no second offline prefill before online rows got a token",
        ),
        pytest.param(
            {"offline_decoding": 12, "rows_decoded": False},
            CAP,
            id="offline rows may wait for a run of prefills",
        ),
        pytest.param(
            {"online_prefilling": 1},
            0,
            id="an online prompt between two chunks takes a chunk, here more than the cap",
        ),
        pytest.param(
            {"online_prefilling": 1, "chunk_tokens": 128},
            0,
            id="an online chunk fills a step that is a chunk long",
        ),
        pytest.param(
            {"online_waiting": 1, "online_waiting_tokens": 100, "online_decoding": 12},
            CAP - 112,
            id="prompts and rows add up",
        ),
    ],
)
def test_prefill_tokens(seen, tokens):
    assert plan(**seen).offline_prefill_tokens == tokens


@pytest.mark.parametrize(
    ("seen", "admissions"),
    [
        pytest.param({}, RESIDENT, id="an idle engine: as many as may be resident"),
        pytest.param({"offline_waiting": 3}, 3, id="no more than wait"),
        pytest.param({"offline_waiting": 0}, 0, id="none when none waits"),
        pytest.param({"free_rows": 5}, 5, id="no more than there are free rows"),
        pytest.param({"free_rows": 0}, 0, id="none without a free row"),
        pytest.param({"offline_decoding": 60}, 4, id="decoding rows are resident"),
        pytest.param({"offline_parked": 60}, 4, id="parked rows are resident"),
        pytest.param(
            {"offline_prefilling": 1, "offline_decoding": 60, "offline_parked": 2},
            1,
            id="a prompt between two chunks is resident",
        ),
        pytest.param({"offline_decoding": 80}, 0, id="none above the limit, and none taken back"),
        pytest.param({"online_arriving": 1}, 0, id="none when the step grants no tokens"),
        pytest.param(
            {"online_decoding": 1}, RESIDENT, id="online rows do not limit who may be resident"
        ),
    ],
)
def test_admissions(seen, admissions):
    assert plan(**seen).offline_admissions == admissions


@pytest.mark.parametrize(
    ("seen", "rows"),
    [
        pytest.param({}, RESIDENT, id="alone: every resident row"),
        pytest.param({"online_arriving": 1}, BESIDE, id="beside an arrival"),
        pytest.param({"online_waiting": 1}, BESIDE, id="beside a waiting request"),
        pytest.param({"online_prefilling": 1}, BESIDE, id="beside a chunked prompt"),
        pytest.param({"online_decoding": 1}, BESIDE, id="beside a decoding row"),
    ],
)
def test_decode_rows(seen, rows):
    assert plan(**seen).offline_decode_rows == rows


@pytest.mark.parametrize(
    ("seen", "reserve"),
    [
        pytest.param({}, 0, id="an empty engine may run a request of any size"),
        pytest.param({"offline_decoding": 1}, 2500, id="a second offline request keeps it"),
        pytest.param({"offline_parked": 1}, 2500, id="a parked row counts as the first"),
        pytest.param({"offline_prefilling": 1}, 2500, id="a chunked prompt counts as the first"),
        pytest.param({"online_decoding": 1}, 2500, id="beside online the reserve stands"),
        pytest.param({"online_waiting": 1}, 2500, id="a waiting online request keeps it too"),
        pytest.param(
            {"offline_decoding": 1, "total_kv_tokens": 0}, 0, id="no pool, nothing to keep free"
        ),
    ],
)
def test_kv_reserve(seen, reserve):
    assert plan(**seen).kv_reserve_tokens == reserve


def test_without_rows_beside_online_every_offline_row_sits_out():
    alone = FixedCap(step_tokens=8, resident_rows=4, rows_beside_online=0, kv_reserve=0.0)
    busy = StepView(now_s=0.0, online_decoding=1)
    assert alone.plan(busy).offline_decode_rows == 0


COUNTED = (
    "online_arriving",
    "online_waiting",
    "online_waiting_tokens",
    "online_decoding",
    "offline_waiting",
    "offline_decoding",
    "offline_parked",
    "free_rows",
    "free_kv_tokens",
    "total_kv_tokens",
    "chunk_tokens",
)

counts = st.integers(0, 10_000)
views = st.builds(
    StepView,
    now_s=st.floats(0, 1e9),
    online_prefilling=st.integers(0, 1),
    offline_prefilling=st.integers(0, 1),
    rows_decoded=st.booleans(),
    **dict.fromkeys(COUNTED, counts),
)


@given(view=views)
def test_no_view_makes_an_invalid_plan_or_one_beyond_its_limits(view):
    made = policy().plan(view)
    assert made.offline_prefill_tokens <= min(CAP, view.chunk_tokens)
    assert made.offline_admissions <= min(view.offline_waiting, view.free_rows)
    assert made.offline_decode_rows in (BESIDE, RESIDENT)
    assert made.kv_reserve_tokens <= view.total_kv_tokens
    assert made.offline_prefill_tokens > 0 or made.offline_admissions == 0


@given(view=views)
def test_a_plan_depends_on_the_view_alone(view):
    used = policy()
    used.plan(StepView(now_s=0.0, online_decoding=3, rows_decoded=False))
    assert used.plan(view) == policy().plan(view)
