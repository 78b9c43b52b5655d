"""A line of JSON is one line to whoever reads it."""

from __future__ import annotations

import json

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.json_lines import json_line, with_escapes

# All that ends a line for Python, text that begins with the same bytes in UTF-8, and the rest.
ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
TEXTS = st.text(
    st.sampled_from(ENDS + '\u2027\u202a\u0084\u00e2\\"') | st.characters(codec="utf-8")
)


@given(st.dictionaries(TEXTS, TEXTS | st.lists(TEXTS, max_size=3), max_size=3))
def test_a_record_is_one_line_and_reads_back_as_it_was(record):
    line = json_line(record)
    assert line.endswith(b"\n")
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line) == msgspec.json.decode(line) == record


def test_json_that_is_there_already_is_escaped_too():
    raw = msgspec.Raw('{"text":"a\u2028b\u2029c\x85d\u2019"}'.encode())
    assert json_line({"body": raw}) == (
        '{"body":{"text":"a\\u2028b\\u2029c\\u0085d\u2019"}}\n'.encode()
    )


def test_what_has_none_of_them_stays_as_it_is():
    assert with_escapes('{"a":"é, 日本, “x”"}'.encode()) == '{"a":"é, 日本, “x”"}'.encode()
