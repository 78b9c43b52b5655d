"""Reads a job and all of its input before anything is sent, and says what is wrong with it.

Each data file is read twice: `make_plan` checks every line and keeps none of them, and `lines`
renders them again one by one as they are asked, so memory does not grow with prompts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from conserve_sgl.errors import InputError, JobError
from conserve_sgl.jobs.schema import ExactMatch, Job, JsonlTask, LoglikelihoodChoice
from conserve_sgl.jobs.template import TemplateFault, compile_expression, compile_template
from conserve_sgl.shapes import explain
from conserve_sgl.strict_yaml import load_yaml

__all__ = ["Line", "Plan", "PlannedTask", "expand", "lines", "make_plan"]

MAX_FAULTS = 10
_VARIABLE = re.compile(r"\$\{(\w*)\}?")


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One input line, rendered. Exactly one of `prompt` and `messages` is set."""

    task: str
    id: str
    line: int
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    choices: list[str] | None = None  # with the delimiter in front, for loglikelihood_choice
    target: str | int | None = None


class PlannedTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task whose every line was read and rendered once.

    `definition` and `data_sha256` fingerprint what a result depends on; `limit` is left out of
    it, so that a job tried on ten lines can go on with all of them.
    """

    task: JsonlTask
    vars: dict[str, str | int | float | bool]
    data: Path
    data_stamp: tuple[int, int]  # size and mtime_ns, to notice an edit during the run
    data_sha256: str
    definition: str
    ids: frozenset[str]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A job that can run: all input was checked, nothing was sent."""

    name: str
    job: Job
    output: Path
    tasks: list[PlannedTask]

    @property
    def total(self) -> int:
        """Lines over all tasks."""
        return sum(len(task.ids) for task in self.tasks)


def make_plan(path: Path, **overrides: object) -> Plan:
    """Read the job at `path` and check all of its input.

    Args:
        overrides: fields of `Job` that replace the file's (endpoints, output, ...), and `limit`,
            which replaces every task's. None means not given.

    Raises:
        InputError: the first fault, its text followed by up to nine more.
    """
    job = _override(path, load_yaml(path, Job), overrides)
    output = Path(expand(path, "output", job.output))
    faults: list[InputError] = []
    tasks = []
    for i, task in enumerate(job.tasks):
        data = path.parent / expand(path, f"tasks[{i}].data", task.data)
        try:
            if not data.is_file():
                what = "is a folder, not a file" if data.is_dir() else "no such file"
                raise InputError(path, f"{what}: {data}", key=f"tasks[{i}].data")
            tasks.append(_plan_task(job, task, data, faults))
        except OSError as e:
            raise InputError(data, f"cannot be read: {e.strerror or e}") from e
    if faults:
        raise _all_in_one(faults)
    _refuse_writing_over_input(path, output, tasks)
    return Plan(name=job.name or path.stem, job=job, output=output, tasks=tasks)


def lines(planned: PlannedTask) -> Iterator[Line]:
    """The task's lines, rendered one by one.

    Raises:
        JobError: the data file is no longer the one that was planned, or cannot be read any more.
    """
    try:
        if _stamp(planned.data) != planned.data_stamp:
            raise JobError(f"{planned.data} was changed after the job had read it: start it again")
        for number, fields in _read(planned.data, planned.task.limit):
            yield _render(planned.task, planned.data, number, planned.vars | fields)
    except OSError as e:
        raise JobError(f"cannot read {planned.data}: {e.strerror or e}") from e


def _override(path: Path, job: Job, overrides: dict[str, object]) -> Job:
    given = {key: value for key, value in overrides.items() if value is not None}
    limit = given.pop("limit", None)
    changed = msgspec.to_builtins(job)
    if given.keys() & {"endpoints", "discover"}:
        changed |= {"endpoints": [], "discover": None}
    changed |= given
    if limit is not None:
        changed["tasks"] = [task | {"limit": limit} for task in changed["tasks"]]
        if changed["lm_eval"] is not None:
            changed["lm_eval"] |= {"limit": limit, "samples": None}
    try:
        return msgspec.convert(changed, Job)
    except msgspec.ValidationError as e:
        fault = explain(e, Job, changed)
        raise InputError(path, f"with the options given: {fault.reason}", key=fault.key) from e


def expand(path: Path, key: str, text: str) -> str:
    """`text`, a path, with ${VARIABLES} and ~ filled in.

    Raises:
        InputError: it is empty, or a variable is not set; `path` and `key` say where it stands.
    """
    if not text:
        raise InputError(path, "is empty", key=key)

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if match[0] != f"${{{name}}}" or not name:
            raise InputError(path, f"{match[0]!r} is not a ${{VARIABLE}}", key=key)
        if not os.environ.get(name):
            raise InputError(path, f"environment variable {name} is not set", key=key)
        return os.environ[name]

    try:
        return str(Path(_VARIABLE.sub(value, text)).expanduser())
    except RuntimeError as e:  # ~ and a name that nobody has
        raise InputError(path, f"{text}: {e}", key=key) from e


def _plan_task(job: Job, task: JsonlTask, data: Path, faults: list[InputError]) -> PlannedTask:
    first_line_of: dict[str, int] = {}
    stamp = _stamp(data)
    for number, fields in _read(data, task.limit, faults):
        try:
            line = _render(task, data, number, _merge(data, number, job.vars, fields))
            if line.id in first_line_of:
                reason = f"{line.id!r} is the id of line {first_line_of[line.id]} too"
                raise InputError(data, reason, line=number, key="id")
            first_line_of[line.id] = number
        except InputError as fault:
            faults.append(fault)
        if len(faults) >= MAX_FAULTS:
            raise _all_in_one(faults)
    if not first_line_of and not faults:
        raise InputError(data, "has no lines")
    return PlannedTask(
        task=task,
        vars=job.vars,
        data=data,
        data_stamp=stamp,
        data_sha256=_sha256(data),
        definition=_definition(job, task),
        ids=frozenset(first_line_of),
    )


def _all_in_one(faults: list[InputError]) -> InputError:
    first, *others = faults[:MAX_FAULTS]
    reason = "".join([first.reason, *(f"\n{other}" for other in others)])
    return InputError(first.path, reason, line=first.line, key=first.key)


def _merge(data: Path, number: int, variables: dict, fields: dict) -> dict:
    if both := sorted(variables.keys() & fields.keys()):
        raise InputError(
            data, "is both a field and one of the job's vars", line=number, key=both[0]
        )
    return variables | fields


def _read(
    data: Path, limit: int | None, faults: list[InputError] | None = None
) -> Iterator[tuple[int, dict]]:
    """(1-based line number, object) of the lines that are not blank, `limit` of them at most.

    Bad lines are added to `faults` and left out, or raised when there is no such list.
    """
    count = 0
    with data.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            if count == limit:
                return
            count += 1
            try:
                yield number, _object(data, number, raw)
            except InputError as fault:
                if faults is None:
                    raise
                faults.append(fault)
                if len(faults) >= MAX_FAULTS:
                    raise _all_in_one(faults) from fault


def _object(data: Path, number: int, raw: bytes) -> dict:
    try:
        value = msgspec.json.decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InputError(data, f"is not JSON: {e}", line=number) from e
    if not isinstance(value, dict):
        raise InputError(data, "is not a JSON object {...}", line=number)
    return value


def _render(task: JsonlTask, data: Path, number: int, fields: dict) -> Line:
    def text(key: str, source: str) -> str:
        try:
            return compile_template(source)(fields)
        except TemplateFault as e:
            raise InputError(data, str(e), line=number, key=key) from e

    def value(key: str, source: str) -> object:
        try:
            return compile_expression(source)(fields)
        except TemplateFault as e:
            raise InputError(data, str(e), line=number, key=key) from e

    line = {"task": task.name, "line": number}
    line["id"] = str(number) if task.id is None else text("id", task.id)
    if task.prompt is not None:
        line["prompt"] = text("prompt", task.prompt)
        if not line["prompt"]:
            raise InputError(data, "renders to nothing", line=number, key="prompt")
    else:
        line["messages"] = [
            {"role": m.role, "content": text(f"chat[{i}].content", m.content)}
            for i, m in enumerate(task.chat or [])
        ]
    score = task.score
    if isinstance(score, ExactMatch):
        line["target"] = text("score.target", score.target)
    elif isinstance(score, LoglikelihoodChoice):
        if isinstance(score.choices, str):
            choices = value("score.choices", score.choices)
        else:
            choices = [text(f"score.choices[{i}]", c) for i, c in enumerate(score.choices)]
        line["choices"] = _choices(data, number, score, choices)
        line["target"] = _index(data, number, value("score.target", score.target), line["choices"])
    return Line(**line)


def _choices(data: Path, number: int, score: LoglikelihoodChoice, choices: object) -> list[str]:
    fits = isinstance(choices, list) and len(choices) >= 2
    if not fits or not all(isinstance(c, str) and c for c in choices):
        reason = "needs a list of at least two texts, none of them empty"
        raise InputError(data, reason, line=number, key="score.choices")
    return [score.delimiter + choice for choice in choices]


def _index(data: Path, number: int, target: object, choices: list[str]) -> int:
    if type(target) is not int or not 0 <= target < len(choices):
        reason = f"{target!r} is not the number of a choice, 0 to {len(choices) - 1}"
        raise InputError(data, reason, line=number, key="score.target")
    return target


def _definition(job: Job, task: JsonlTask) -> str:
    # The data file is known by its content: a moved checkout may go on.
    what = {k: v for k, v in msgspec.to_builtins(task).items() if k not in ("limit", "data")}
    what |= {"model": job.model, "vars": job.vars}
    return hashlib.sha256(msgspec.json.encode(what, order="sorted")).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _refuse_writing_over_input(path: Path, output: Path, tasks: list[PlannedTask]) -> None:
    inputs = {task.data.resolve() for task in tasks}
    for task in tasks:
        if (output / f"{task.task.name}.jsonl").resolve() in inputs:
            reason = f"results of {task.task.name} would be written over an input file"
            raise InputError(path, reason, key="output")
