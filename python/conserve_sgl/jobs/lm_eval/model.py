"""The lm-eval model `conserve`: an API model whose requests are offline work.

lm-eval makes the requests, tokenises and truncates them, and keeps its cache; what is ours is how
they are sent (`Poster`) and how a reply is read. Imports lm_eval and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.registry import register_model
from lm_eval.models.api_models import TemplateAPI
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs

from conserve_sgl.client.http import BadReply
from conserve_sgl.errors import JobError
from conserve_sgl.jobs.ask import TextReply
from conserve_sgl.jobs.lm_eval.poster import Poster
from conserve_sgl.jobs.schema import Job, ModelArgs

__all__ = ["ConserveLM", "generate_body", "score", "score_body"]

# What SGLang's sampling_params take, and lm-eval's other names for some of it.
_SAMPLING = {
    *("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("min_new_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens", "regex"),
    *("json_schema", "no_stop_trim", "sampling_seed"),
}
_OTHER_NAMES = {"seed": "sampling_seed", "stop": "until"}
_NOT_SENT = {"do_sample", "until", "max_gen_toks", "temperature"}


def generate_body(prompt: Sequence[int], gen_kwargs: dict[str, Any], max_new_tokens: int) -> dict:
    """A `/generate` request for lm-eval's `generate_until`.

    Args:
        prompt: token ids.
        gen_kwargs: lm-eval's; greedy unless `do_sample` or a temperature above 0 says otherwise.
        max_new_tokens: if `gen_kwargs` has no limit of its own.

    Raises:
        JobError: SGLang has no such sampling parameter.
    """
    named = {_OTHER_NAMES.get(key, key): value for key, value in gen_kwargs.items()}
    given = normalize_gen_kwargs(named, max_new_tokens)
    params = {key: value for key, value in given.items() if key not in _NOT_SENT}
    if unknown := sorted(params.keys() - _SAMPLING):
        raise JobError(f"gen_kwargs: SGLang has no sampling parameter {unknown[0]!r}")
    params |= {
        "max_new_tokens": given["max_gen_toks"],
        "temperature": given.get("temperature", 0.0),
        "stop": [text for text in given["until"] if text],
    }
    return {"input_ids": list(prompt), "sampling_params": params}


def score_body(tokens: Sequence[int], context_tokens: int) -> dict[str, Any]:
    """A `/generate` request that scores `tokens` after the first `context_tokens`, at least 1.

    SGLang gives logprobs from `logprob_start_len` on, the first of them empty.
    """
    return {
        "input_ids": list(tokens),
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": context_tokens - 1,
        "top_logprobs_num": 1,
    }


def score(reply: TextReply, scored_tokens: int) -> tuple[float, bool]:
    """Summed logprob of the scored tokens, and whether each one was the likeliest.

    Args:
        reply: to a `score_body`.
        scored_tokens: how many tokens that body had after its context, at least 1.

    Raises:
        BadReply: it has not that many logprobs.
    """
    tokens = reply.meta_info.input_token_logprobs[1:]
    likeliest = reply.meta_info.input_top_logprobs[1:]
    if not len(tokens) == len(likeliest) == scored_tokens > 0:
        raise BadReply(f"it has {len(tokens)} logprobs and not {scored_tokens}")
    # JSON has no infinity: SGLang writes null for a token that cannot be.
    logprob = sum(-math.inf if value is None else value for value, *_ in tokens)
    greedy = all(token[1] == top[0][1] for token, top in zip(tokens, likeliest, strict=True))
    return float(logprob), greedy


class _Rolling:
    """The log-likelihood of one long text, summed up as its windows are answered."""

    def __init__(self, text: str, windows: int) -> None:
        self.text = text
        self.left = windows
        self.logprob = 0.0


@register_model("conserve")
class ConserveLM(TemplateAPI):
    """Loglikelihood, rolling loglikelihood and generation by SGLang's `/generate`.

    Args:
        poster: sends, and counts.
        job: `model` and `priority` go into each request.
        model: the name of the model in results.
        args: lm-eval's `model_args`, with tokenizer and max_length set.
    """

    MULTIMODAL = False

    def __init__(self, poster: Poster, job: Job, model: str, args: ModelArgs) -> None:
        super().__init__(
            model=model,
            base_url=job.discover or job.endpoints[0],
            tokenizer=args.tokenizer,
            revision=args.revision or "main",
            trust_remote_code=args.trust_remote_code,
            use_fast_tokenizer=args.use_fast_tokenizer,
            max_length=args.max_length,
            max_gen_toks=args.max_gen_toks,
            add_bos_token=args.add_bos_token,
            custom_prefix_token_id=args.custom_prefix_token_id,
            num_concurrent=max(2, job.max_in_flight),  # 1 would take lm-eval's own way of sending
        )
        self._poster = poster
        self._template_kwargs = args.chat_template_kwargs
        tags = {"model": job.model, "priority": job.priority, "service_tier": "flex"}
        self._tags = {key: value for key, value in tags.items() if value is not None}

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **_: Any) -> Any:
        """Token ids of a text, or of each of several.

        As lm-eval's `hf` model does it: the tokenizer's own habit about bos, unless `model_args`
        has another; never a second bos.
        """
        if not isinstance(string, str):
            return [self.tok_encode(text, add_special_tokens) for text in string]
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            special = False
        return self.tokenizer.encode(
            string, **({} if special is None else {"add_special_tokens": special})
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template_kwargs,
        )

    def loglikelihood(self, requests: list, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """As lm-eval's; a text that has no tokens is refused, where that has an IndexError."""
        bare = [request.args for request in requests if request.args[0] == ""]
        _refuse(bare, lambda pair: self.tok_encode(pair[1], add_special_tokens=False))
        return super().loglikelihood(requests, *args, **kwargs)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        """Where each continuation has been tokenised with its context, and nothing is sent yet.

        One that merges into the last token of its context has no tokens of its own. lm-eval's `hf`
        model ends with an assertion there; the sum over no token, 0, would call it certain.
        """
        texts = [request for request in requests if not isinstance(request[0], _Rolling)]
        _refuse([key for key, _, tokens in texts if not tokens], lambda _: None)
        for (context, continuation), tokens, _ in texts:
            if not tokens:  # it is nothing but spaces, which lm-eval gives to the continuation
                raise JobError(f"{context!r} before {_shown(continuation)} has no token")
        return super()._loglikelihood_tokens(requests, **kwargs)

    def loglikelihood_rolling(self, requests: list, **_: Any) -> list[float]:
        """All windows of all texts at once, where lm-eval's own goes text by text."""
        given = [("", text) for (text,) in (request.args for request in requests) if text]
        _refuse(given, lambda pair: self.tok_encode(pair[1], add_special_tokens=False))
        texts, windows = [], []
        for (text,) in (request.args for request in requests):
            parts = list(self._windows(text))
            texts.append(_Rolling(text, len(parts)))
            windows += [(texts[-1], *part) for part in parts]
        self._loglikelihood_tokens(windows)
        return [text.logprob for text in texts]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        rolling = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length - 1,  # one for the context
            context_len=1,
        )
        return map(utils.make_disjoint_window, rolling)

    async def get_batched_requests(
        self,
        requests: list[list[int]],
        cache_keys: list[Any],
        *,
        generate: bool = True,
        ctxlens: list[int] | None = None,
        gen_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> list[list[Any]]:
        """Where lm-eval sends its requests: the answers in order, each in a list of its own."""
        answers: list[list[Any]] = [[] for _ in requests]
        for i, context_tokens in enumerate(ctxlens or []):
            if context_tokens < 1:
                raise self._too_long(cache_keys[i], len(requests[i]) - context_tokens)

        def bodies() -> Iterator[tuple[int, dict[str, Any]]]:
            # Sorted by tokens: neighbours share prefixes, and are in flight together.
            for i in sorted(range(len(requests)), key=requests.__getitem__):
                if ctxlens is None:
                    body = generate_body(requests[i], gen_kwargs or {}, self._max_gen_toks)
                else:
                    body = score_body(requests[i], ctxlens[i])
                yield i, body | self._tags

        def answered(i: int, reply: TextReply) -> None:
            if ctxlens is None:
                answers[i] = [reply.text]
            else:
                answers[i] = [score(reply, len(requests[i]) - ctxlens[i])]
            self._remember(name, cache_keys[i], answers[i][0])

        name = "generate_until" if generate else "loglikelihood"
        await self._poster.post_all(name, len(requests), bodies(), answered)
        return answers

    def _remember(self, method: str, key: Any, answer: Any) -> None:
        if not isinstance(key, _Rolling):
            self.cache_hook.add_partial(method, key, answer)
            return
        key.logprob += answer[0]
        key.left -= 1
        if key.left == 0:
            self.cache_hook.add_partial("loglikelihood_rolling", (key.text,), key.logprob)

    def _too_long(self, key: Any, tokens: int) -> JobError:
        text = key.text if isinstance(key, _Rolling) else key[1]
        return JobError(
            f"{_shown(text)} has {tokens} tokens, with one before and one after it more than "
            f"max_length {self.max_length + 1}"  # lm-eval takes one away
        )

    # Three methods that TemplateAPI wants, for a way of sending that is not used here.
    def _create_payload(self, *args: Any, **kwargs: Any) -> dict:
        raise NotImplementedError

    @staticmethod
    def parse_logprobs(*args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError

    @staticmethod
    def parse_generations(*args: Any, **kwargs: Any) -> list[str]:
        raise NotImplementedError


def _refuse(pairs: list[tuple[str, str]], tokens_of: Callable[[tuple[str, str]], Any]) -> None:
    """Raise JobError if a continuation of the `pairs` (context, continuation) has no tokens."""
    without = [pair for pair in pairs if not tokens_of(pair)]
    if not without:
        return
    (context, continuation), *others = without
    after = f" after {_shown(context)}" if context else ""
    more = f" (one of {len(without)} such texts)" if others else ""
    raise JobError(
        f"{_shown(continuation)}{after} has no token of its own to be scored{more}: it is empty or "
        "becomes one with the last token before it; another target_delimiter or text may help"
    )


def _shown(text: str) -> str:
    """Its end: what stands before a continuation may be long."""
    return repr(text if len(text) <= 60 else f"...{text[-57:]}")
