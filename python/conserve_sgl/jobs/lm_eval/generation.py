"""The generation parameters of a job's lm-eval tasks, checked before anything is sent.

Imports lm_eval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from lm_eval.api.group import Group

from conserve_sgl.errors import InputError, JobError
from conserve_sgl.jobs.lm_eval.model import generate_body
from conserve_sgl.jobs.schema import ModelArgs, Sampling
from conserve_sgl.shapes import explain

__all__ = ["prepared"]

_LIMIT = "max_gen_toks"
# lm-eval takes all of them, the first that is there. But it makes room for the answer by the first
# name alone, and a job's would not replace a task's of another name.
_LIMIT_NAMES = (_LIMIT, "max_new_tokens", "max_tokens", "max_completion_tokens")


def prepared(
    path: Path, tasks: list[Any], gen_kwargs: Mapping[str, Any], args: ModelArgs
) -> dict[str, Any]:
    """`gen_kwargs` of the job at `path`, and those of its `tasks`, in place, under one name each.

    Args:
        tasks: tasks and groups of them, as lm-eval has loaded them.
        args: with `max_length` set.

    Raises:
        InputError: the server would refuse them, or no token is left for a prompt.
    """
    given = _with_one_limit(gen_kwargs)
    for task in _generating(tasks):
        own = _with_one_limit(task.config.generation_kwargs or {})
        task.set_config(key="generation_kwargs", value=own)
        try:
            _check(own | given, args)
        except (JobError, ValueError, TypeError) as e:
            raise InputError(path, f"{task.config.task}: {e}", key=_key(own, given)) from e
    return given


def _generating(tasks: list[Any]) -> Iterator[Any]:
    for task in tasks:
        if isinstance(task, Group):
            yield from _generating(task.get_all_tasks())
        elif task.get_config("output_type") == "generate_until":
            yield task


def _with_one_limit(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    limits = [kwargs[name] for name in _LIMIT_NAMES if kwargs.get(name) is not None]
    rest = {key: value for key, value in kwargs.items() if key not in _LIMIT_NAMES}
    return rest | ({_LIMIT: limits[0]} if limits else {})


def _check(kwargs: dict[str, Any], args: ModelArgs) -> None:
    limit, room = kwargs.get(_LIMIT, args.max_gen_toks), args.max_length
    assert room is not None  # the server has said it, or the job
    if type(limit) is not int:
        raise ValueError(f"{_LIMIT}: must be a whole number, not {limit!r}")
    if limit >= room - 1:  # lm-eval keeps one back
        raise ValueError(f"{_LIMIT} {limit} leaves no token for a prompt in max_length {room}")
    params = generate_body([], kwargs, args.max_gen_toks)["sampling_params"]
    params["seed"] = params.pop("sampling_seed", None)
    known = {key: value for key, value in params.items() if key in Sampling.__struct_fields__}
    try:
        msgspec.convert(known, Sampling)
    except msgspec.ValidationError as e:
        fault = explain(e, Sampling, known)
        raise ValueError(f"{fault.key}: {fault.reason}" if fault.key else fault.reason) from e


def _key(own: dict[str, Any], given: dict[str, Any]) -> str:
    """Where what was checked comes from, the last word first."""
    if given:
        return "lm_eval.gen_kwargs"
    return "lm_eval.tasks" if own else "lm_eval.model_args"
