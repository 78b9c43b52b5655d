"""Speculative decoding on a plain CPU: `--speculative-algorithm NGRAM`, without a compiler.

SGLang's own worker drafts trees from a trie in C++ that is compiled at its start, and verifies them
with kernels that no plain CPU has. Here drafts are chains, from a table of what followed which few
tokens in all that was read and said; a step then is an extend of a few tokens for each row, and a
drafted token counts where it is the one that is sampled at its place. Everything else, KV for the
drafts, results and accounts, is SGLang's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache import allocation, memory_pool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.ngram_info import NgramVerifyInput
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask

from conserve_sgl.errors import IncompatibleError

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

__all__ = ["NgramTable", "NgramWorker", "draft_slots", "install"]

_ORDERS = (4, 2)
"""Tokens that a continuation is looked up by; the longest that is known decides."""


def install() -> None:
    """Fill SGLang's seams in this process. Idempotent."""
    allocation.assign_req_to_token_pool_func = _write_slots
    memory_pool.copy_all_layer_kv_cache_func = _move_nothing


def _move_nothing(*_of_a_tree: Any) -> None:
    """What is accepted of a chain is where it belongs; SGLang warms its copy up all the same."""


def _write_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,  # noqa: ARG001  of SGLang's signature
) -> None:
    """Enter new KV slots, row after row, at [start, end) of the rows' entries in `req_to_token`."""
    counts = (end_offset - start_offset).tolist()
    slots = out_cache_loc.to(req_to_token.dtype).split(counts)
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), slots, strict=True)
    for row, start, some in rows:
        req_to_token[row, start : start + len(some)] = some


def draft_slots(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    draft_token_num: int,
    **_known: Any,
) -> torch.Tensor:
    """The KV slots of the tokens that a step verifies, row after row, int64."""
    columns = start_offset.unsqueeze(1) + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices.unsqueeze(1), columns].flatten().to(torch.int64)


class NgramTable:
    """What came last after each few tokens.

    Args:
        capacity: entries; the oldest go first.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._next: dict[tuple[int, ...], int] = {}

    def read(self, tokens: Sequence[int]) -> None:
        """Take in what follows what in `tokens`."""
        for order in _ORDERS:
            for i in range(order, len(tokens)):
                self._next[tuple(tokens[i - order : i])] = tokens[i]
        while len(self._next) > self._capacity:
            del self._next[next(iter(self._next))]

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """`n` tokens that may follow `tokens`; zeros where nothing is known."""
        text = list(tokens[-max(_ORDERS) :])
        drafted: list[int] = []
        for _ in range(n):
            token = self._after(text)
            if token is None:
                break
            drafted.append(token)
            text.append(token)
        return drafted + [0] * (n - len(drafted))

    def _after(self, text: list[int]) -> int | None:
        known = (self._next.get(tuple(text[-order:])) for order in _ORDERS if len(text) >= order)
        return next((token for token in known if token is not None), None)

    def clear(self) -> None:
        """Forget everything."""
        self._next.clear()


class NgramWorker(BaseSpecWorker):
    """Drafts with an `NgramTable`, and verifies with the model itself.

    Ranks draft the same, since they read the same tokens in the same order.
    """

    def __init__(
        self,
        server_args: Any,
        gpu_id: int,  # noqa: ARG002  of SGLang's signature
        nccl_port: int,  # noqa: ARG002
        target_worker: TpModelWorker,
    ) -> None:
        super().__init__()
        self.server_args = server_args
        self._target_worker = target_worker
        spec = get_spec()
        if spec.speculative_ngram_external_corpus_path is not None:
            raise IncompatibleError(
                "--speculative-ngram-external-corpus-path: a plain CPU drafts without; leave it out"
            )
        self.speculative_num_draft_tokens = self._width = spec.speculative_num_draft_tokens
        self._table = NgramTable(spec.speculative_ngram_capacity)
        self._known: set[str] = set()

    @property
    def draft_worker(self) -> None:
        """No model drafts."""
        return

    def clear_cache_pool(self) -> None:
        """The server's cache was flushed."""
        self._table.clear()
        self._known.clear()

    def add_external_corpus(self, *_given: Any) -> int:
        """Never: SGLang answers with the message."""
        raise IncompatibleError("a plain CPU drafts without external corpora")

    def remove_external_corpus(self, *_given: Any) -> None:
        """Never: SGLang answers with the message."""
        raise IncompatibleError("a plain CPU drafts without external corpora")

    def list_external_corpora(self) -> dict[str, int]:
        """There are none."""
        return {}

    def forward_batch_generation(
        self,
        batch: ScheduleBatch,
        on_publish: Callable[[torch.Tensor], None] | None = None,
        pp_proxy_tensors: Any = None,  # noqa: ARG002  one stage
    ) -> GenerationBatchResult:
        """Run a prefill as ever, or a decode step that gives each row one token or several.

        Returns:
            `next_token_ids` [rows * width], of which the first `accept_lens` of each row count;
            [rows] of a prefill.
        """
        if batch.forward_mode.is_decode():
            return self._decode(batch, on_publish)
        result = self._target_worker.forward_batch_generation(batch)
        tokens = torch.zeros(len(batch.reqs), self._width, dtype=torch.int64)
        tokens[:, 0] = result.next_token_ids
        result.accept_lens = torch.ones(len(batch.reqs), dtype=torch.int32)
        return self._finish(result, tokens, batch.seq_lens.clone(), on_publish)

    def _decode(
        self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None
    ) -> GenerationBatchResult:
        rows = len(batch.reqs)
        drafts = torch.tensor(self._drafts(batch))
        columns = torch.arange(self._width)
        positions = (batch.seq_lens.unsqueeze(1) + columns).flatten()
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = drafts.flatten()
        batch.out_cache_loc = draft_slots(
            req_pool_indices=batch.req_pool_indices,
            req_to_token=batch.req_to_token_pool.req_to_token,
            start_offset=batch.seq_lens,
            draft_token_num=self._width,
        )
        batch.spec_info = NgramVerifyInput(
            draft_token=batch.input_ids,
            positions=positions,
            draft_token_num=self._width,
            new_seq_lens=batch.seq_lens,
        )
        result = self._target_worker.forward_batch_generation(batch, is_verify=True)
        sampled = self._sample(batch, result, drafts, positions).view(rows, self._width)
        right = (drafts[:, 1:] == sampled[:, :-1]).to(torch.int32)
        result.accept_lens = right.cumprod(1).sum(1, dtype=torch.int32) + 1
        if batch.return_logprob:
            index = torch.arange(rows * self._width).view(rows, self._width)
            index = index.masked_fill(columns >= result.accept_lens.unsqueeze(1), -1)
            compute_spec_logprobs(
                batch, result.logits_output, sampled.flatten(), accept_index=index
            )
        result.next_token_ids = sampled.flatten()
        batch.forward_mode = ForwardMode.DECODE
        return self._finish(result, sampled, batch.seq_lens + result.accept_lens, on_publish)

    def _finish(
        self,
        result: GenerationBatchResult,
        tokens: torch.Tensor,
        new_seq_lens: torch.Tensor,
        on_publish: Callable[[torch.Tensor], None] | None,
    ) -> GenerationBatchResult:
        if on_publish is not None:
            on_publish(new_seq_lens)
        result.new_seq_lens = new_seq_lens
        result.speculative_num_draft_tokens = self._width
        result.next_draft_input = NgramVerifyInput(
            draft_token_num=self._width,
            new_seq_lens=new_seq_lens,
            accept_tokens=tokens.flatten(),
            accept_lens=result.accept_lens,
        )
        return result

    # ------------------------------------------------------------------ drafting

    def _drafts(self, batch: ScheduleBatch) -> list[list[int]]:
        """For each row its last token, whose KV is not computed yet, and what may follow it."""
        tails = self._in_flight(batch)
        drafts = []
        for req, tail in zip(batch.reqs, tails, strict=True):
            text = self._text(req, tail)
            self._table.read(text)
            drafts.append([text[-1], *self._table.draft(text, self._width - 1)])
        self._known = {req.rid for req in batch.reqs}
        return drafts

    def _text(self, req: Req, tail: list[int]) -> list[int]:
        """All of a row that is new here, else the part that the last step may have added to."""
        if req.rid not in self._known:
            return [*req.origin_input_ids, *req.output_ids, *tail]
        seen = max(_ORDERS) + self._width
        told = [*req.output_ids[-seen:], *tail]
        return [*req.origin_input_ids[-seen:], *told][-seen:]

    def _in_flight(self, batch: ScheduleBatch) -> list[list[int]]:
        """With overlap scheduling, what the last step gave each request and it was not told yet."""
        given = batch.spec_info.accept_tokens.view(-1, self._width).tolist()
        counts = batch.spec_info.accept_lens.tolist()
        tails = [tokens[:count] for tokens, count in zip(given, counts, strict=True)]
        # A row whose last step is longer ago was told; its last token has no KV yet.
        committed = batch.seq_lens.tolist()
        return [
            tail if req.seqlen <= tokens else []
            for req, tail, tokens in zip(batch.reqs, tails, committed, strict=True)
        ]

    # ------------------------------------------------------------------ sampling

    def _sample(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        drafts: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """A token for every place, as it would be sampled there had the drafts before it come."""
        runner = self._target_worker.model_runner
        info = _for_each_place(batch.sampling_info, self._width)
        logits = result.logits_output.next_token_logits
        if batch.has_grammar:
            info.grammar_mask = build_grammar_vocab_mask(
                reqs=batch.reqs,
                tree=GrammarTree.from_linear_chain(drafts),
                sampling_info=batch.sampling_info,
                device=logits.device,
                barrier=None,
            )
        info.apply_logits_bias(logits)
        return runner.sampler(result.logits_output, info, False, None, None, positions).long()


def _for_each_place(info: SamplingBatchInfo, width: int) -> SamplingBatchInfo:
    """`info`, [rows, ...], repeated for the `width` places of each row: [rows * width, ...]."""
    names = (
        "temperatures",
        "top_ps",
        "top_ks",
        "min_ps",
        "sampling_seed",
        "logit_bias",
        "acc_additive_penalties",
        "acc_scaling_penalties",
    )
    values = {name: getattr(info, name) for name in names}
    repeated = {n: v.repeat_interleave(width, 0) for n, v in values.items() if v is not None}
    return dataclasses.replace(
        info,
        **repeated,
        grammars=None,
        grammar_mask=None,
        has_custom_logit_processor=False,
        return_sampling_masks=None,
        sampling_mask_batch_indices=None,
    )
