"""The job's tag goes into SGLang's custom_params and comes out again, and leaves the rest."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy import JobTag
from conserve_sgl.policy.job_tag import TAG_KEY

TAGS = st.builds(
    JobTag,
    received_s=st.floats(0, 1e9),
    job=st.text(max_size=128),
    deadline_s=st.none() | st.floats(-1e9, 1e9),
)
INTEGERS = st.integers(-(2**63), 2**64 - 1)  # msgpack's, which SGLang's processes speak
PARAMS = st.none() | st.dictionaries(st.text(min_size=1), INTEGERS | st.text(), max_size=3)


@given(TAGS, PARAMS)
def test_it_comes_out_as_it_went_in(tag, params):
    params = None if params is None else {k: v for k, v in params.items() if k != TAG_KEY}
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(tag.put_into(params)))
    assert JobTag.take_out(carried) == (tag, params or None)


def test_neither_end_changes_what_it_is_given():
    params = {"thinking_budget": 3}
    tagged = JobTag(received_s=1.0, job="a").put_into(params)
    JobTag.take_out(tagged)
    assert params == {"thinking_budget": 3}
    assert TAG_KEY in tagged


@pytest.mark.parametrize("params", [None, {}, {"thinking_budget": 3}])
def test_where_there_is_none_nothing_is_taken(params):
    assert JobTag.take_out(params) == (None, params)


def test_a_tag_of_a_client_s_is_replaced():
    mine = JobTag(received_s=1.0)
    assert JobTag.take_out(mine.put_into({TAG_KEY: {"job": "theirs"}})) == (mine, None)


@pytest.mark.parametrize("theirs", ["offline", None, [1], {"job": "a"}, {"received_s": "now"}])
def test_something_else_under_its_key_is_taken_out_and_no_tag(theirs):
    assert JobTag.take_out({TAG_KEY: theirs, "a": 1}) == (None, {"a": 1})
