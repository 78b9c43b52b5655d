"""What a job's YAML file may say (docs/jobs.md is the reference for people)."""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Any, Literal

import msgspec

from conserve_sgl.client.bounds import (
    MOST_INT32,
    MOST_S,
    Count,
    InFlight,
    Priority,
    Seconds,
)
from conserve_sgl.client.retry import Retry
from conserve_sgl.jobs.template import TemplateFault, compile_expression, compile_template
from conserve_sgl.urls import check_base_url

__all__ = [
    "ExactMatch",
    "Job",
    "JsonlTask",
    "LmEval",
    "LoglikelihoodChoice",
    "Message",
    "ModelArgs",
    "Sampling",
]

_MOST_INT64 = 2**63 - 1
_MOST_STOPS = 32

Number = Annotated[int, msgspec.Meta(ge=0, le=MOST_INT32)]
Fraction = Annotated[float, msgspec.Meta(ge=1e-30, le=1)]
# Also the name of the result file, hence neither dots nor separators.
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to sample. What is None is left out, so the server's own default holds."""

    max_new_tokens: Count = 128
    min_new_tokens: Number | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1e30)] = 0.0
    top_p: Fraction | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=MOST_INT32)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=1e-6, le=2)] | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[Number] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-_MOST_INT64, le=_MOST_INT64)] | None = None
    ignore_eos: bool | None = None
    regex: str | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        if self.top_k == 0:
            raise ValueError("top_k: 0 keeps no token; leave it out or use -1 for all tokens")
        if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens: is larger than max_new_tokens")
        if self.regex is not None and self.json_schema is not None:
            raise ValueError("regex: cannot be given together with json_schema")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > _MOST_STOPS or "" in stops:
            raise ValueError(f"stop: up to {_MOST_STOPS} texts, none of them empty")
        if self.regex is not None:
            _compiles("regex", _compile_of_any_dialect, self.regex)
        if self.json_schema is not None:
            schema = _compiles("json_schema", msgspec.json.decode, self.json_schema)
            if not isinstance(schema, dict):
                raise ValueError("json_schema: is JSON, but not an object {...}")


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One chat message; `content` is a template."""

    role: Literal["system", "user", "assistant"]
    content: str

    def __post_init__(self) -> None:
        _compiles("content", compile_template, self.content)


class ExactMatch(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="exact_match",
    tag_field="kind",
):
    """1 if what `pattern` captures in the output equals the rendered `target`, else 0."""

    target: str
    pattern: str = r"(?s)^\s*(.*?)\s*$"
    match: Literal["first", "last"] = "first"
    ignore: str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        _compiles("target", compile_template, self.target)
        if _compiles("pattern", re.compile, self.pattern).groups != 1:
            raise ValueError("pattern: needs exactly one group ( ), which is the answer")
        if self.ignore is not None:
            _compiles("ignore", re.compile, self.ignore)


class LoglikelihoodChoice(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="loglikelihood_choice",
    tag_field="kind",
):
    """1 if the likeliest of `choices` after the prompt is number `target` (from 0), else 0."""

    choices: str | list[str]
    target: str
    delimiter: str = " "
    normalise: Literal["none", "tokens", "bytes"] = "none"

    def __post_init__(self) -> None:
        _compiles("target", compile_expression, self.target)
        if isinstance(self.choices, str):
            _compiles("choices", compile_expression, self.choices)
            return
        if len(self.choices) < 2:
            raise ValueError("choices: at least two are needed")
        for i, choice in enumerate(self.choices):
            _compiles(f"choices[{i}]", compile_template, choice)


class JsonlTask(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="jsonl",
    tag_field="kind",
):
    """One request (or one question with choices) for each line of a JSONL file."""

    name: Name
    data: str
    prompt: str | None = None
    chat: list[Message] | None = None
    chat_template_kwargs: dict[str, str | int | float | bool] | None = None
    sampling: Sampling | None = None
    score: ExactMatch | LoglikelihoodChoice | None = None
    limit: Count | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.chat is None):
            raise ValueError("prompt: exactly one of prompt and chat is needed")
        if self.prompt is not None:
            _compiles("prompt", compile_template, self.prompt)
        if self.chat is not None and not self.chat:
            raise ValueError("chat: at least one message is needed")
        if self.chat_template_kwargs is not None and self.chat is None:
            raise ValueError("chat_template_kwargs: needs chat")
        if self.id is not None:
            _compiles("id", compile_template, self.id)
        if isinstance(self.score, LoglikelihoodChoice):
            self._check_choice()

    def _check_choice(self) -> None:
        if self.prompt is None:
            raise ValueError("score: loglikelihood_choice needs prompt, not chat")
        if self.sampling is not None:
            raise ValueError("sampling: loglikelihood_choice samples nothing; leave it out")


class ModelArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`model_args` of lm-eval, for its model `conserve`; what is None is asked from the server."""

    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    use_fast_tokenizer: bool = True
    max_length: Annotated[int, msgspec.Meta(ge=2, le=MOST_INT32)] | None = None
    max_gen_toks: Count = 256
    add_bos_token: bool | None = None
    custom_prefix_token_id: Number | None = None
    chat_template_kwargs: dict[str, str | int | float | bool] = {}


# As numpy takes them.
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class LmEval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tasks of lm-evaluation-harness, under the keys of its own configuration file."""

    tasks: Annotated[list[str | dict[str, Any]], msgspec.Meta(min_length=1)]
    model: Literal["conserve"] = "conserve"
    model_args: ModelArgs = ModelArgs()
    num_fewshot: Number | None = None
    limit: Annotated[float, msgspec.Meta(gt=0, le=MOST_INT32)] | None = None
    samples: dict[str, list[Number]] | None = None
    gen_kwargs: dict[str, Any] = {}
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    use_cache: str | None = None
    output_path: str | None = None
    log_samples: bool = True
    predict_only: bool = False
    include_path: str | None = None
    seed: Seed | list[Seed | None] | None = None
    bootstrap_iters: Number = 100000
    confirm_run_unsafe_code: bool = False
    metadata: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.limit is not None and self.samples is not None:
            raise ValueError("samples: cannot be given together with limit")
        if self.limit is not None and self.limit > 1 and self.limit % 1:
            raise ValueError("limit: a number of questions, or a share of them below 1")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn: needs apply_chat_template")
        if isinstance(self.seed, list) and len(self.seed) != 4:
            raise ValueError("seed: one number, or four (random, numpy, torch, fewshot)")
        for i, task in enumerate(self.tasks):
            if isinstance(task, dict) and not task.keys() & {"task", "group"}:
                raise ValueError(f"tasks[{i}]: an entry needs the key task (or group)")


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An offline job: where to send, how much at once, where the results go, and its tasks.

    `tasks` run first, then `lm_eval`.
    """

    endpoints: list[str] = []
    discover: str | None = None
    output: str
    tasks: list[JsonlTask] = []
    lm_eval: LmEval | None = None
    name: str | None = None
    model: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    priority: Priority | None = None
    deadline_s: Seconds | None = None
    max_in_flight: InFlight = 32
    request_timeout_s: Seconds | None = None
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=MOST_S)] = 10.0
    retry: Retry = msgspec.field(default_factory=Retry)
    api_key_env: str | None = None
    save_prompts: bool = False
    vars: dict[str, str | int | float | bool] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks and self.lm_eval is None:
            raise ValueError("tasks: there are none, and no lm_eval either")
        if self.api_key_env is not None and not re.fullmatch(r"[^=\0]+", self.api_key_env):
            raise ValueError(
                "api_key_env: must be the name of an environment variable; leave it out where the "
                "servers want no key"
            )
        if bool(self.endpoints) == (self.discover is not None):
            what = "leave one of the two out" if self.endpoints else "give one of the two"
            raise ValueError(f"endpoints: servers, or the gateway that has them (discover): {what}")
        for endpoint in self.endpoints:
            _check_url("endpoints", endpoint)
        if self.discover is not None:
            _check_url("discover", self.discover)
        _unique("endpoints", self.endpoints)
        # File systems that fold case would put two such tasks into one file.
        _unique("tasks", [task.name.lower() for task in self.tasks])


def _check_url(key: str, url: str) -> None:
    try:
        check_base_url(url)
    except ValueError as e:
        raise ValueError(f"{key}: {e}") from e


def _unique(key: str, values: list[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{key}: {value!r} is given twice")


# An escape of any dialect, and a range that begins or ends with one.
_ESCAPE = r"\\(?:[pPux]\{[^{}]*\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)"
_ESCAPES = re.compile(rf"{_ESCAPE}(?:-(?:{_ESCAPE}|[^]\\]))?|[^][\\]-{_ESCAPE}", re.DOTALL)
_NAMED = re.compile(r"\(\?<(?![=!])[^>]*>")
_FLAGS = re.compile(r"\(\?[a-zA-Z-]+\)")


def _compile_of_any_dialect(source: str) -> None:
    """Refuse what no grammar backend of a server can read, and only that.

    Their dialects differ from Python's in escapes, in names of groups and in where flags stand.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a class in a class
        try:
            re.compile(source)
        except re.error:
            re.compile(_ESCAPES.sub("a", _FLAGS.sub("", _NAMED.sub("(", source))))


def _compiles(key: str, compile_, source: str):
    try:
        return compile_(source)
    except (TemplateFault, re.error, msgspec.DecodeError, RecursionError, OverflowError) as e:
        raise ValueError(f"{key}: {e}") from e
