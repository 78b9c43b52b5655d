"""docs/jobs.md names every key a job may have, and its example is a job."""

from __future__ import annotations

import re

import msgspec
import pytest

from conserve_sgl.client.retry import Retry
from conserve_sgl.jobs import schema
from conserve_sgl.jobs.plan import make_plan
from conserve_sgl.jobs.records import Failure, Record

STRUCTS = [
    schema.Job,
    Retry,
    schema.JsonlTask,
    schema.Message,
    schema.Sampling,
    schema.ExactMatch,
    schema.LoglikelihoodChoice,
    schema.LmEval,
    schema.ModelArgs,
    Record,
    Failure,
]


@pytest.fixture(scope="module")
def page(checkout) -> str:
    return (checkout / "docs" / "jobs.md").read_text()


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: s.__name__)
def test_every_key_is_documented(page, struct):
    missing = [f for f in struct.__struct_fields__ if f"`{f}`" not in page]
    assert missing == []


def default_of(row: str) -> str:
    return row.split("|")[2].strip()


@pytest.mark.parametrize("struct", STRUCTS[:9], ids=lambda s: s.__name__)
def test_the_defaults_are_those_of_the_code(page, struct):
    section = page.split(f"<!-- {struct.__name__} -->")[1].split("\n\n")[0]
    rows = {row.split("`")[1]: default_of(row) for row in section.splitlines() if "| `" in row}
    for field in msgspec.structs.fields(struct):
        if isinstance(field.default, int | float | str) and field.default is not None:
            shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
            assert rows[field.name].strip('`"') == str(shown), field.name
        elif field.required:
            assert rows[field.name] == "required", field.name


def test_the_examples_are_good_jobs(page, tmp_path):
    example, harness = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "capitals.jsonl").write_text('{"country": "Portugal", "capital": "Lisbon"}\n')
    (tmp_path / "job.yaml").write_text(example)
    assert make_plan(tmp_path / "job.yaml").total == 1
    (tmp_path / "job.yaml").write_text(harness)
    assert len(make_plan(tmp_path / "job.yaml").job.lm_eval.tasks) == 3
