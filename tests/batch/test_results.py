from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from conserve_sgl.batch.results import Results, usage_of
from conserve_sgl.batch.schema import (
    InputDetails,
    LineResponse,
    OutputDetails,
    ResultLine,
    Usage,
    failed_line,
)

BODY = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 2}}'


def answer(custom_id: str, status: int = 200, body: bytes = BODY) -> ResultLine:
    response = LineResponse(status_code=status, request_id="q", body=msgspec.Raw(body))
    return ResultLine(id="i", custom_id=custom_id, response=response, error=None)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "output", tmp_path / "errors"


def written(*paths: Path) -> list[list[str]]:
    return [
        [msgspec.json.decode(x)["custom_id"] for x in p.read_bytes().splitlines()] for p in paths
    ]


def test_what_succeeded_and_what_did_not_go_to_different_files(paths):
    results = Results(*paths, total=4)
    for line in (answer("a"), answer("b", 400), failed_line("c", "batch_expired", "late")):
        results.add(line)
    results.close()
    assert written(*paths) == [["a"], ["b", "c"]]
    counts = results.counts
    assert (counts.total, counts.completed, counts.failed) == (4, 1, 2)
    shown = msgspec.json.decode(paths[1].read_bytes().splitlines()[1])
    assert shown["response"] is None
    assert shown["error"] == {"code": "batch_expired", "message": "late"}
    first = msgspec.json.decode(paths[0].read_bytes())
    assert first["error"] is None
    assert first["response"]["body"]["usage"]["prompt_tokens"] == 3


def test_it_goes_on_where_it_stopped(paths):
    results = Results(*paths)
    results.add(answer("a"))
    results.add(answer("b", 500))
    results.close()
    again = Results(*paths)
    assert again.done == {"a", "b"}
    assert again.usage.total_tokens == results.usage.total_tokens == 10
    again.add(answer("c"))
    again.close()
    assert written(*paths) == [["a", "c"], ["b"]]


@pytest.mark.parametrize("torn_at", range(1, 12))
def test_a_torn_last_line_is_cut_off(paths, torn_at):
    results = Results(*paths)
    results.add(answer("a"))
    whole = paths[0].stat().st_size
    results.add(answer("b"))
    results.close()
    torn = paths[0].read_bytes()
    size = whole + (len(torn) - whole) * torn_at // 12
    paths[0].write_bytes(torn[:size])
    again = Results(*paths)
    assert again.done == {"a"}
    again.add(answer("b"))
    again.close()
    assert written(*paths) == [["a", "b"], []]


def test_a_whole_line_without_its_end_is_torn(paths):
    results = Results(*paths)
    results.add(answer("a"))
    results.close()
    paths[0].write_bytes(paths[0].read_bytes().rstrip())
    again = Results(*paths)
    again.close()
    assert again.done == set()


def test_damage_in_the_middle_costs_what_follows(paths):
    results = Results(*paths)
    for custom_id in "abc":
        results.add(answer(custom_id))
    results.close()
    lines = paths[0].read_bytes().splitlines(keepends=True)
    lines[1] = b"\0" * len(lines[1])
    paths[0].write_bytes(b"".join(lines))
    again = Results(*paths)
    again.close()
    assert again.done == {"a"}
    assert paths[0].read_bytes() == lines[0]


def test_a_request_is_in_one_file_only(paths):
    results = Results(*paths)
    results.add(answer("a"))
    results.close()
    paths[1].write_bytes(paths[0].read_bytes())
    again = Results(*paths)
    again.close()
    assert (again.counts.completed, again.counts.failed) == (1, 0)


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (b'{"usage": null}', Usage()),
        (b"[]", Usage()),
        (b'{"usage": 3}', Usage()),
        (b'{"usage": {"prompt_tokens": 3}}', Usage(input_tokens=3, total_tokens=3)),
        (
            b'{"usage": {"prompt_tokens": 9, "completion_tokens": 4, "reasoning_tokens": 2,'
            b' "prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens_details": null}}',
            Usage(
                input_tokens=9,
                input_tokens_details=InputDetails(cached_tokens=8),
                output_tokens=4,
                output_tokens_details=OutputDetails(reasoning_tokens=2),
                total_tokens=13,
            ),
        ),
        (
            b'{"usage": {"input_tokens": 9, "output_tokens": 4,'
            b' "input_tokens_details": {"cached_tokens": 8},'
            b' "output_tokens_details": {"reasoning_tokens": 2}}}',
            Usage(
                input_tokens=9,
                input_tokens_details=InputDetails(cached_tokens=8),
                output_tokens=4,
                output_tokens_details=OutputDetails(reasoning_tokens=2),
                total_tokens=13,
            ),
        ),
    ],
)
def test_usage_of_every_endpoint(body, usage):
    assert usage_of(body) == usage
