from __future__ import annotations

import itertools
import json
from pathlib import Path

import msgspec
import pytest

from conserve_sgl.bench.load.arrivals import Lengths
from conserve_sgl.bench.load.backlog import JsonlPrompts, RandomPrompts
from conserve_sgl.errors import InputError

RANDOM = RandomPrompts(
    prompt=Lengths(median_tokens=20, max_tokens=40, min_tokens=10, sigma=0.5),
    output=Lengths(median_tokens=8, max_tokens=16, min_tokens=4, sigma=0.5),
    prefix_tokens=30,
    prefix_groups=2,
)


def first(backlog: RandomPrompts | JsonlPrompts, n: int, seed: int = 1) -> list[dict]:
    bodies = itertools.islice(backlog.bodies([seed], {"priority": -100}), n)
    return [msgspec.json.decode(body) for body in bodies]


def test_random_prompts_have_the_lengths_that_were_drawn_after_their_prefix() -> None:
    for body in first(RANDOM, 200):
        assert 30 + 10 <= len(body["input_ids"]) <= 30 + 40
        assert 4 <= body["sampling_params"]["max_new_tokens"] <= 16
        assert body["sampling_params"]["ignore_eos"] is True
        assert body["priority"] == -100


def test_random_prompts_share_a_prefix_within_their_group_alone() -> None:
    ids = [tuple(body["input_ids"]) for body in first(RANDOM, 200)]

    assert len({prompt[:30] for prompt in ids}) == 2
    assert len({prompt[30:38] for prompt in ids}) == 200


def test_the_same_seed_gives_the_same_backlog() -> None:
    assert first(RANDOM, 20) == first(RANDOM, 20)
    assert first(RANDOM, 20) != first(RANDOM, 20, seed=2)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"q": "question {i}", "a": "answer {i}"}}\n' for i in range(4)))
    return path


def test_prompts_of_a_file_follow_their_shots_over_and_over(questions: Path) -> None:
    backlog = JsonlPrompts(str(questions), field="q", max_tokens=9, answer_field="a", shots=2)

    bodies = first(backlog, 5)

    shots = "question 0\nanswer 0\n\nquestion 1\nanswer 1\n\n"
    asked = [body["text"].removeprefix(shots) for body in bodies]
    assert asked == [f"question {i}\n" for i in (2, 3, 2, 3, 2)]
    assert bodies[0]["sampling_params"]["max_new_tokens"] == 9
    assert bodies[0]["sampling_params"]["ignore_eos"] is False


@pytest.mark.parametrize(
    ("line", "found", "reason"),
    [
        ('{"q": 3}', ":5: q: ", "no text"),
        ("{}", ":5: q: ", "missing"),
        ("[]", ":5: ", "not a JSON object"),
        ("{", ":5: ", "not a JSON object"),
    ],
)
def test_a_bad_line_is_named(questions: Path, line: str, found: str, reason: str) -> None:
    with questions.open("a") as file:
        file.write(f"{line}\n")

    with pytest.raises(InputError, match=reason) as refused:
        first(JsonlPrompts(str(questions), field="q", max_tokens=9), 1)

    assert found in str(refused.value)


def test_a_file_of_shots_alone_is_refused(questions: Path) -> None:
    backlog = JsonlPrompts(str(questions), field="q", max_tokens=9, answer_field="a", shots=4)
    with pytest.raises(InputError, match="no line beyond its 4 shots"):
        first(backlog, 1)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        first(JsonlPrompts(str(tmp_path / "none"), field="q", max_tokens=9), 1)


def test_shots_need_answers() -> None:
    with pytest.raises(msgspec.ValidationError, match="answer_field"):
        msgspec.json.decode(
            json.dumps({"kind": "jsonl", "path": "x", "field": "q", "max_tokens": 1, "shots": 1}),
            type=JsonlPrompts,
        )
