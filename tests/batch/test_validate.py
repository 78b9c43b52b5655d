from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch.lines import CHAT, jsonl, request, requests
from conserve_sgl.batch.validate import (
    MAX_ERRORS,
    InputRefused,
    Limits,
    read_plan,
    read_request,
)


@pytest.fixture
def file(tmp_path: Path):
    """Writes an input file."""

    def write(*lines) -> Path:
        path = tmp_path / "in.jsonl"
        path.write_bytes(jsonl(*lines))
        return path

    return write


def ids(path: Path, plan) -> list[str]:
    """The custom_ids in the order of sending."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return [read_request(fd, *where).custom_id for where in plan]
    finally:
        os.close(fd)


def refused(path: Path, endpoint: str | None = CHAT, limits: Limits | None = None):
    with pytest.raises(InputRefused) as caught:
        read_plan(path, endpoint, limits or Limits())
    return caught.value.errors


def test_every_line_is_planned_once(file):
    path = file(requests(20))
    plan = read_plan(path, CHAT, Limits())
    assert (plan.model, plan.total, len(plan)) == ("m", 20, 20)
    assert sorted(ids(path, plan)) == sorted(f"r{i}" for i in range(20))


def test_a_line_is_read_back_as_it_stands(file):
    path = file(request("a", "ä\n€"))
    (where,) = read_plan(path, CHAT, Limits())
    fd = os.open(path, os.O_RDONLY)
    line = read_request(fd, *where)
    os.close(fd)
    assert bytes(line.body) == jsonl(request("a", "ä\n€")["body"]).strip()


def test_what_is_done_is_left_out_and_still_counted(file):
    path = file(requests(5))
    plan = read_plan(path, CHAT, Limits(), done={"r1", "r3", "of another file"})
    assert plan.total == 5
    assert sorted(ids(path, plan)) == ["r0", "r2", "r4"]


def test_byte_order_mark_blank_lines_and_crlf_are_taken(file):
    one, two = jsonl(request("a")).strip(), jsonl(request("b")).strip()
    path = file(b"\xef\xbb\xbf" + one + b"\r\n\r\n  \n" + two)
    plan = read_plan(path, CHAT, Limits())
    assert plan.total == 2
    assert sorted(ids(path, plan)) == ["a", "b"]


def test_common_prefixes_are_neighbours(file):
    long, short = "l" * 5000, "s" * 5000
    lines = []
    for i in range(6):
        lines.append(request(f"l{i}", f"{long} {i}"))
        lines.append(request(f"s{i}", f"{short} {i}"))
    path = file(*lines)
    order = "".join(custom_id[0] for custom_id in ids(path, read_plan(path, CHAT, Limits())))
    assert order in ("l" * 6 + "s" * 6, "s" * 6 + "l" * 6)


def test_a_longer_common_prefix_is_nearer(file):
    # All share 1024 bytes; those of a kind share 4096.
    common, kinds = "c" * 2000, {"x": "x" * 5000, "y": "y" * 5000}
    lines = [
        request(f"{k}{i}", common + text + str(i)) for i in range(4) for k, text in kinds.items()
    ]
    path = file(*lines)
    order = "".join(custom_id[0] for custom_id in ids(path, read_plan(path, CHAT, Limits())))
    assert order in ("xxxxyyyy", "yyyyxxxx")


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (b"{nope}\n", "invalid_json_line", "not JSON"),
        (b'{"custom_id": "x\xff"}\n', "invalid_json_line", "not JSON"),
        (b'{"custom_id": "a", "body": ' + b"[" * 9999 + b"\n", "invalid_json_line", "not JSON"),
        (b"[1]\n", "invalid_request", "object"),
        (request("b", custom_id=None), "missing_required_parameter", "custom_id"),
        (request("b", method=None), "missing_required_parameter", "method"),
        (request("b", url=None), "missing_required_parameter", "url"),
        (request("b") | {"body": None}, "invalid_request", "body"),
        (request("b") | {"body": 3}, "invalid_request", "body"),
        (request("b") | {"priority": 1}, "invalid_request", "priority"),
        (request("b") | {"custom_id": 7}, "invalid_request", "custom_id"),
        (request(""), "invalid_custom_id", "characters"),
        (request("x" * 513), "invalid_custom_id", "characters"),
        (request("a"), "duplicate_custom_id", "earlier line"),
        (request("b", method="GET"), "invalid_method", "POST"),
        (request("b", url="/v1/completions"), "invalid_url", CHAT),
        (request("b", url="/flush_cache"), "invalid_url", CHAT),
        (request("b", body={"stream": True}), "invalid_request", "stream"),
        (request("b", body={"stream": "yes"}), "invalid_request", "stream"),
        (request("b", body={"background": True}), "invalid_request", "background"),
        (request("b", body={"model": "other"}), "mismatched_model", "other"),
        (request("b", body={"model": None}), "mismatched_model", "None"),
        (request("b", body={"model": 3}), "invalid_request", "model"),
        (request("b", "x" * 3000), "line_too_long", "2000"),
    ],
)
def test_a_faulty_line_is_named(file, line, code, said):
    path = file(request("a"), line, request("z"))
    (error,) = refused(path, limits=Limits(max_line_bytes=2000 if "long" in code else 10**6))
    assert (error.code, error.line) == (code, 2)
    assert said in f"{error.message} {error.param}"


BAD_FIRST = [
    request("a", method="GET"),
    request("a", body={"stream": True}),
    request("a", body={"model": 5}),
    request("a", url="/v1/models"),
    request("", "x"),
    request("a", custom_id=None),
    b"{nope}\n",
    b'{"custom_id":"a","method":"POST","url":"%b","body":{"model":"m","n":1e999}}\n'
    % CHAT.encode(),
]


@pytest.mark.parametrize("first", BAD_FIRST)
def test_a_faulty_line_puts_no_blame_on_others(file, first):
    lines = [request(f"r{i}") for i in range(99)]
    errors = refused(file(first, *lines, request("last", method="PUT")))
    assert [error.line for error in errors] == [1, 101]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.none() | st.integers(0, len(BAD_FIRST) - 1), min_size=1, max_size=40))
def test_exactly_the_faulty_lines_are_blamed(file, kinds):
    """In whatever order; None is a good line. A faulty one's id is its own, or none."""
    lines = []
    for number, kind in enumerate(kinds, 1):
        bad = request(f"r{number}") if kind is None else BAD_FIRST[kind]
        if isinstance(bad, dict) and bad.get("custom_id") == "a":
            bad = bad | {"custom_id": f"r{number}"}
        elif isinstance(bad, bytes):
            bad = bad.replace(b'"a"', b'"r%d"' % number)
        lines.append(bad)
    path = file(*lines)
    faulty = [number for number, kind in enumerate(kinds, 1) if kind is not None]
    if faulty:
        assert [error.line for error in refused(path)] == faulty
    else:
        assert len(read_plan(path, CHAT, Limits())) == len(kinds)


def test_the_model_of_most_lines_is_the_right_one(file):
    odd = [request(f"o{i}", body={"model": "other"}) for i in range(3)]
    good = [request(f"g{i}") for i in range(300)]
    errors = refused(file(odd[0], *good[:150], odd[1], *good[150:], b"{\n", odd[2]))
    assert [(error.line, error.code) for error in errors] == [
        (1, "mismatched_model"),
        (152, "mismatched_model"),
        (303, "invalid_json_line"),
        (304, "mismatched_model"),
    ]
    assert errors[0].message == "'other', and line 2 has 'm': one model for all lines"


def test_when_no_model_has_most_lines_the_first_one_is_right(file):
    lines = [request(str(i), body={"model": "ab"[i % 2]}) for i in range(300)]
    errors = refused(file(*lines))
    assert [error.line for error in errors] == list(range(2, 202, 2))


def test_too_many_inputs_are_said_once(file):
    def line(i: int) -> dict:
        return request(str(i), url="/v1/embeddings") | {"body": {"model": "m", "input": ["a"] * 4}}

    errors = refused(
        file(*(line(i) for i in range(9)), request("z", method="GET")),
        endpoint=None,
        limits=Limits(max_embedding_inputs=10),
    )
    assert [(e.code, e.line) for e in errors] == [("too_many_inputs", 3), ("invalid_method", 10)]


@pytest.mark.parametrize(
    "value",
    [
        b"1e999",
        b"-1e999",
        b'[0, {"x": 1e400}]',
        b"9" * 5000,
        b'"\\ud800"',
        b"[" * 3000 + b"]" * 3000,
    ],
)
def test_what_cannot_be_read_whole_is_refused(file, value):
    body = b'{"model": "m", "messages": [], "temperature": ' + value + b"}"
    line = b'{"custom_id": "b", "method": "POST", "url": "%b", "body": %b}\n'
    (error,) = refused(file(request("a"), line % (CHAT.encode(), body)))
    assert (error.code, error.line) == ("invalid_json_line", 2)


def test_null_is_as_if_it_were_not_there(file):
    path = file(
        request("a") | {"body": {"model": "m", "prompt": "null", "n": None, "stream": None}}
    )
    (where,) = read_plan(path, CHAT, Limits())
    fd = os.open(path, os.O_RDONLY)
    line = read_request(fd, *where)
    os.close(fd)
    assert bytes(line.body) == b'{"model":"m","prompt":"null"}'


def test_a_line_that_is_too_long_does_not_hide_the_next(file):
    path = file(request("a", "x" * 3_000_000), b"{}\n", request("b", "x" * 3_000_000))
    errors = refused(path, limits=Limits(max_line_bytes=1000))
    assert [(e.code, e.line) for e in errors] == [
        ("line_too_long", 1),
        ("missing_required_parameter", 2),
        ("line_too_long", 3),
    ]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(file, content):
    (error,) = refused(file(content))
    assert (error.code, error.line) == ("empty_file", None)


def test_all_faults_are_named_up_to_a_hundred(file):
    errors = refused(file(*[b"nope\n"] * (MAX_ERRORS + 50)))
    assert [e.line for e in errors] == list(range(1, MAX_ERRORS + 1))


def test_too_many_requests(file):
    path = file(requests(12))
    assert len(read_plan(path, CHAT, Limits(max_requests=12))) == 12
    (error,) = refused(path, limits=Limits(max_requests=11))
    assert (error.code, error.line) == ("too_many_requests", 12)


def test_without_an_endpoint_each_line_names_its_own(file):
    path = file(request("a"), request("b", url="/v1/completions"))
    assert len(read_plan(path, None, Limits())) == 2
    (error,) = refused(file(request("a", url="/v1/models")), endpoint=None)
    assert error.code == "invalid_url"


def test_texts_to_embed_are_counted_not_lines(file):
    def line(i: int, text: object) -> dict:
        return request(str(i), url="/v1/embeddings") | {"body": {"model": "m", "input": text}}

    path = file(line(1, "one"), line(2, ["two", "three"]), line(3, [4, 4]), line(4, [[5], [6]]))
    assert len(read_plan(path, "/v1/embeddings", Limits(max_embedding_inputs=6))) == 4
    (error,) = refused(path, "/v1/embeddings", Limits(max_embedding_inputs=5))
    assert (error.code, error.line) == ("too_many_inputs", 4)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_plan(tmp_path / "none", CHAT, Limits())


def test_a_file_that_changed_is_noticed(file):
    path = file(requests(2))
    where = next(iter(read_plan(path, CHAT, Limits())))
    path.write_bytes(b"x" * path.stat().st_size)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="changed"):
        read_request(fd, *where)
    os.close(fd)


def test_reading_can_be_stopped(file):
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    path = file(*(request(str(i), "x" * 400_000) for i in range(4)))
    with pytest.raises(Stop):
        read_plan(path, CHAT, Limits(), breathe=stop)


PEAK = """
import resource, sys
from pathlib import Path
from conserve_sgl.batch.validate import Limits, read_plan

def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak_kib()
plan = read_plan(Path(sys.argv[1]), "/v1/chat/completions", Limits())
print(len(plan), (peak_kib() - before) * 1024)
"""


def test_fifty_thousand_lines_stay_on_disk(tmp_path):
    path = tmp_path / "big.jsonl"
    line = jsonl(request("NAME", "word " * 780))
    with path.open("wb") as file:
        file.writelines(line.replace(b"NAME", b"request-%d" % i) for i in range(50_000))
    assert path.stat().st_size > 200_000_000
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    )
    planned, grown_bytes = map(int, done.stdout.split())
    assert planned == 50_000
    assert grown_bytes < 40_000_000
