from __future__ import annotations

import json

import pytest

from conserve_sgl.batch.answers import fault_of


def chat(finish_reason: str | None) -> dict:
    return {"choices": [{"message": {"content": "a"}, "finish_reason": finish_reason}]}


@pytest.mark.parametrize(
    "answer",
    [
        chat("stop"),
        chat("length"),
        chat("tool_calls"),
        {"object": "list", "data": [{"embedding": [0.5]}]},
        {"object": "response", "status": "completed", "error": None},
        {"object": "response", "status": "incomplete", "incomplete_details": {"reason": "x"}},
        chat("stop") | {"error": None},
    ],
)
def test_an_answer(answer):
    assert fault_of(json.dumps(answer).encode()) is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (chat("abort"), "aborted"),
        (chat("error"), "aborted"),
        ({"choices": [*chat("stop")["choices"], *chat("abort")["choices"]]}, "aborted"),
        ({"object": "response", "status": "failed"}, "status is failed"),
        ({"object": "response", "status": "cancelled"}, "status is cancelled"),
        ({"object": "response", "status": "in_progress"}, "status is in_progress"),
        ({"status": "failed", "error": {"message": "Generation aborted"}}, "Generation aborted"),
        ({"error": {"message": "no room"}}, "no room"),
        ({"error": "no room"}, "no room"),
        (["a"], "not one of this route"),
    ],
)
def test_an_answer_that_says_it_is_none(answer, said):
    assert said in fault_of(json.dumps(answer).encode())


@pytest.mark.parametrize("raw", [b"", b"<html>", b"data: {}\n\n", b'{"choices": 3}', b"{\xff}"])
def test_what_no_route_answers(raw):
    assert "not one of this route" in fault_of(raw)
