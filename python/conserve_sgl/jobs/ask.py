"""From a rendered line to requests, and from their replies to a record.

Text goes to SGLang's `/generate`, chat to `/v1/chat/completions` (with `service_tier: "flex"`,
the tag that survives gateways). `priority` is sent only if the job gives it: its sign depends on
a flag of the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import msgspec

from conserve_sgl.client.clock import Clock
from conserve_sgl.client.http import BadReply, Client, LineFailed
from conserve_sgl.client.retry import Attempts
from conserve_sgl.jobs.plan import Line
from conserve_sgl.jobs.records import Record
from conserve_sgl.jobs.schema import ExactMatch, Job, JsonlTask, LoglikelihoodChoice, Sampling
from conserve_sgl.jobs.score import (
    ChoiceLogprob,
    extract,
    matches,
    pick_choice,
    shared_prefix_tokens,
)

__all__ = ["ask", "asked_path", "chat_body", "choice_body", "choice_logprob", "generate_body"]

# Our name, and where the two routes want it under another one.
_NATIVE_NAMES = {"seed": "sampling_seed"}
_CHAT_NAMES = {"max_new_tokens": "max_completion_tokens", "min_new_tokens": "min_tokens"}


def generate_body(
    model: str | None, prompt: str, sampling: Sampling, priority: int | None = None
) -> dict[str, Any]:
    """A `/generate` request."""
    params = {_NATIVE_NAMES.get(k, k): v for k, v in _given(sampling).items()}
    return _optional(model=model, priority=priority) | {"text": prompt, "sampling_params": params}


def chat_body(
    model: str | None,
    messages: list[dict[str, str]],
    sampling: Sampling,
    template_kwargs: dict[str, Any] | None,
) -> dict[str, Any]:
    """A `/v1/chat/completions` request."""
    params = {_CHAT_NAMES.get(k, k): v for k, v in _given(sampling).items()}
    if (schema := params.pop("json_schema", None)) is not None:
        params["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": msgspec.json.decode(schema)},
        }
    if template_kwargs is not None:
        params["chat_template_kwargs"] = template_kwargs
    return _optional(model=model) | {"messages": messages, "service_tier": "flex"} | params


def choice_body(
    model: str | None,
    input_ids: Sequence[Sequence[int]],
    shared_tokens: int,
    priority: int | None = None,
) -> dict[str, Any]:
    """A `/generate` request that scores each of `input_ids` after its first `shared_tokens`.

    SGLang gives logprobs from `logprob_start_len` on, the first of them empty, and caches the
    prefix up to there only; so it starts at the last shared token.
    """
    return _optional(model=model, priority=priority) | {
        "input_ids": input_ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": shared_tokens - 1,
    }


class MetaInfo(msgspec.Struct, frozen=True, kw_only=True):
    finish_reason: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    input_token_logprobs: list[list[Any]] = []
    input_top_logprobs: list[Any] = []


class TextReply(msgspec.Struct, frozen=True, kw_only=True):
    meta_info: MetaInfo
    text: str = ""


class ScoredChoice(NamedTuple):
    """One choice and the token counts of the request that scored it."""

    logprob: ChoiceLogprob
    meta_info: MetaInfo


class TokensReply(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[list[int]]


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    content: str | None = None
    reasoning_content: str | None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    message: ChatMessage
    finish_reason: str


class CachedTokens(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    choices: Annotated[list[ChatChoice], msgspec.Meta(min_length=1)]
    usage: Usage


def read_text(raw: bytes) -> TextReply:
    """A reply of `/generate` to one text. Raises BadReply if the server aborted it."""
    return _not_aborted(msgspec.json.decode(raw, type=TextReply))


def read_choices(raw: bytes, tokens: Sequence[int]) -> list[ScoredChoice]:
    """A reply to `choice_body`, in which so many `tokens` of each choice are scored.

    Raises BadReply if any was aborted, or has not a logprob for each of them.
    """
    replies = [_not_aborted(reply) for reply in msgspec.json.decode(raw, type=list[TextReply])]
    scored = [ScoredChoice(choice_logprob(reply), reply.meta_info) for reply in replies]
    found = [one.logprob.tokens for one in scored]
    if found != list(tokens):
        raise BadReply(f"it has {found} logprobs and not {list(tokens)}")
    return scored


def read_chat(raw: bytes) -> ChatReply:
    """A reply of `/v1/chat/completions`. Raises BadReply if the server aborted it."""
    reply = msgspec.json.decode(raw, type=ChatReply)
    if reply.choices[0].finish_reason == "abort":
        raise BadReply("aborted by the server")
    return reply


def read_tokens(raw: bytes) -> TokensReply:
    """A reply of `/tokenize`."""
    return msgspec.json.decode(raw, type=TokensReply)


def choice_logprob(reply: TextReply) -> ChoiceLogprob:
    """The summed logprob of one choice in a reply to `choice_body`. Raises BadReply without one."""
    values = [row[0] for row in reply.meta_info.input_token_logprobs[1:]]
    if not values:
        raise BadReply("there are no logprobs in it")
    # JSON has no infinity: SGLang writes null for a token that cannot be.
    logprob = None if None in values else float(sum(values))
    return ChoiceLogprob(logprob=logprob, tokens=len(values))


def asked_path(task: JsonlTask) -> str:
    """The path that the first request for each line of `task` goes to."""
    if isinstance(task.score, LoglikelihoodChoice):
        return "/tokenize"
    return "/generate" if task.chat is None else "/v1/chat/completions"


async def ask(
    client: Client, job: Job, task: JsonlTask, line: Line, attempts: Attempts, clock: Clock
) -> Record:
    """Send `line`, and score what comes back. Counts on in `attempts`.

    Raises:
        LineFailed, Stopped, JobError: as `Client.post`.
    """
    started_s = clock.monotonic_s()
    if isinstance(task.score, LoglikelihoodChoice):
        answer = await _ask_choice(client, job, task.score, line, attempts)
    elif line.messages is not None:
        answer = await _ask_chat(client, job, task, line, attempts)
    else:
        answer = await _ask_text(client, job, task, line, attempts)
    if isinstance(task.score, ExactMatch):
        extracted = extract(task.score, answer["output"])
        right = matches(task.score, extracted, str(line.target))
        answer |= {"extracted": extracted, "score": float(right)}
    return Record(
        id=line.id,
        line=line.line,
        latency_s=round(clock.monotonic_s() - started_s, 4),
        done_unix_s=round(clock.wall_s(), 3),
        attempts=attempts.sent,
        target=line.target,
        prompt=(line.prompt or line.messages) if job.save_prompts else None,
        **answer,
    )


async def _ask_text(
    client: Client, job: Job, task: JsonlTask, line: Line, attempts: Attempts
) -> dict[str, Any]:
    sampling = task.sampling or Sampling()
    body = generate_body(job.model, line.prompt or "", sampling, job.priority)
    reply, _ = await client.post("/generate", body, read_text, attempts)
    return {
        "output": reply.text,
        "finish_reason": str(reply.meta_info.finish_reason.get("type")),
        **_tokens([reply.meta_info]),
    }


async def _ask_chat(
    client: Client, job: Job, task: JsonlTask, line: Line, attempts: Attempts
) -> dict[str, Any]:
    sampling = task.sampling or Sampling()
    body = chat_body(job.model, line.messages or [], sampling, task.chat_template_kwargs)
    reply, _ = await client.post("/v1/chat/completions", body, read_chat, attempts)
    choice, usage = reply.choices[0], reply.usage
    details = usage.prompt_tokens_details
    return {
        "output": choice.message.content or "",
        "reasoning": choice.message.reasoning_content,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": details.cached_tokens if details else None,
    }


async def _ask_choice(
    client: Client, job: Job, score: LoglikelihoodChoice, line: Line, attempts: Attempts
) -> dict[str, Any]:
    prompt, choices = line.prompt or "", line.choices or []
    body = _optional(model=job.model) | {"prompt": [prompt, *(prompt + c for c in choices)]}
    reply, near = await client.post("/tokenize", body, read_tokens, attempts)
    context, *candidates = reply.tokens
    for text, tokens in zip(choices, candidates, strict=True):
        if tokens == context[: len(tokens)]:
            raise LineFailed(None, f"the choice {text!r} adds no token to the prompt")
    shared = shared_prefix_tokens(context, candidates)
    if shared == 0:
        raise LineFailed(None, "prompt and choices share no first token: the prompt is too short")
    # The first choice leaves the prompt in the radix cache, the others find it there.
    scored: list[ScoredChoice] = []
    for part in (candidates[:1], candidates[1:]):
        body = choice_body(job.model, part, shared, job.priority)
        read = partial(read_choices, tokens=[len(tokens) - shared for tokens in part])
        some, near = await client.post("/generate", body, read, attempts, near)
        scored += some
    texts = [choice.removeprefix(score.delimiter) for choice in choices]
    chosen = pick_choice(score, texts, [one.logprob for one in scored])
    return {
        "output": texts[chosen],
        "finish_reason": "scored",
        "chosen": chosen,
        "choices": [one.logprob for one in scored],
        "score": float(chosen == line.target),
        **_tokens([one.meta_info for one in scored]),
    }


def _tokens(replies: Sequence[MetaInfo]) -> dict[str, int | None]:
    cached = [meta.cached_tokens for meta in replies]
    return {
        "prompt_tokens": sum(meta.prompt_tokens for meta in replies),
        "completion_tokens": sum(meta.completion_tokens for meta in replies),
        "cached_tokens": None if None in cached else sum(cached),
    }


def _not_aborted(reply: TextReply) -> TextReply:
    if reply.meta_info.finish_reason.get("type") == "abort":
        raise BadReply(f"aborted: {reply.meta_info.finish_reason.get('message')}")
    return reply


def _given(sampling: Sampling) -> dict[str, Any]:
    return {k: v for k, v in msgspec.structs.asdict(sampling).items() if v is not None}


def _optional(**fields: object) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
