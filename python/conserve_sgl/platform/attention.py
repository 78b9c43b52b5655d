"""Attention on a CPU: P*(C + P) for P new tokens over C cached, and decode rows in batches.

Everything rests on one shape. The G query heads that share a KV head become G rows of one query
matrix ("folded"), so no KV is repeated, and ATen's CPU flash kernel gets the several rows it is
fast with. What was measured and left aside (docs/cpu-platform.md has the figures):

- torch_native pads the queries to C + P rows and throws C of them away: (C + P)^2.
- `is_causal` aligns the mask top left, so it serves C = 0 alone; there it is slower than blocks for
  512 tokens and 5% faster for 2048.
- `enable_gqa` runs one row per head in decode: 4x slower in bf16.
- One call per decode request pays its fixed cost per request; padding to the longest pays for
  padding. Groups of similar length bound both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from conserve_sgl.errors import IncompatibleError
from conserve_sgl.platform import NAME

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

__all__ = ["CpuAttnBackend", "DecodeGroup", "ExtendSpan", "StepPlan", "group_rows"]

_BLOCK_ROWS = 128
"""Query tokens per call in an extend: above its diagonal block nothing is computed."""

_GROUP_WASTE_TOKENS = 1024
"""Padding that a decode group may hold: about what the three calls of one more group cost."""

_GROUP_TOKENS_PER_THREAD = 4096
"""KV tokens that a decode group gathers at most per thread (one row may exceed it)."""


@dataclass(frozen=True)
class DecodeGroup:
    """Query rows of one token each, over contexts of similar length.

    rows: [n] indices of query rows. slots: [n * longest] KV slots, row after row; beyond a row's
    context it repeats the row's first slot. mask: [n, 1, 1, longest], added to the scores; None
    if all contexts are equally long. In a layer with a window, a context is what the window shows.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class ExtendSpan:
    """Query rows [start, start + new_tokens) of one request; slots: [cached + new_tokens], of the
    cached tokens only those that the first of the rows sees."""

    start: int
    new_tokens: int
    slots: torch.Tensor


@dataclass(frozen=True)
class StepPlan:
    """How one batch is computed, the same in every layer with the same view of the KV. Every query
    row is in exactly one part.

    seq_lens: the batch's own tensor, which tells whether a plan belongs to a batch.
    """

    seq_lens: torch.Tensor
    groups: tuple[DecodeGroup, ...]
    spans: tuple[ExtendSpan, ...]


def group_rows(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Split rows into groups of similar length, longest first.

    Yields indices into `lengths`. In a group the padding stays within a small constant, and rows
    times longest within `max_tokens` unless it is a single row.
    """
    group: list[int] = []
    waste = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[group[0]] if group else lengths[row]
        waste += longest - lengths[row]
        if group and (waste > _GROUP_WASTE_TOKENS or (len(group) + 1) * longest > max_tokens):
            yield group
            group, waste = [], 0
        group.append(row)
    if group:
        yield group


@dataclass(frozen=True)
class _Layer:
    """What one layer sees of a batch.

    window: tokens before its own that a token sees; None for all of them.
    is_pooled: its KV is in the pool of the windows, whose slots are others than those of the
        tokens' rows.
    """

    window: int | None
    is_pooled: bool


class CpuAttnBackend(TorchNativeAttnBackend):
    """torch_native's backend with its two inner loops replaced.

    Decode, extend, mixed and split-prefill batches of causal self-attention run here, with
    sliding windows and attention sinks. Cross-attention, encoder layers and a KV cache of another
    dtype than the queries' go to torch_native's loops. Multi-head latent attention is attention
    with one KV head, whose values are the first part of its keys.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        if model_runner.use_mla_backend:
            _attend_to_latents()
        super().__init__(model_runner)
        self._dtype = model_runner.dtype
        self._scratch: dict[str, torch.Tensor] = {}
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        self._plans: dict[_Layer, StepPlan] = {}
        self._layer = _Layer(None, is_pooled=False)
        self._sinks: torch.Tensor | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Begin with `forward_batch`, which each kind of layer plans when it comes to it."""
        if forward_batch.forward_mode.is_target_verify():
            _as_extend(forward_batch)
        super().init_forward_metadata(forward_batch)
        self._plans.clear()

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """torch_native's, in which `sinks` [Hq] are a score for each head that has no value."""
        self._enter(layer, sinks)
        return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `forward_extend`."""
        self._enter(layer, sinks)
        return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)

    def _enter(self, layer: RadixAttention, sinks: torch.Tensor | None) -> None:
        window = layer.sliding_window_size
        is_pooled = False
        if self.use_sliding_window_kv_pool:
            _, is_pooled = self.token_to_kv_pool.layers_mapping[layer.layer_id]
        self._layer = _Layer(None if window is None or window < 0 else window, is_pooled)
        self._sinks = sinks

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        if encoder_lens is not None or not causal or self._is_theirs(query, k_cache):
            return super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
        plan = self._plan_of(req_to_token, req_pool_indices, seq_lens, extend_seq_lens)
        self._attend(plan, query, output, k_cache, v_cache, scaling)
        return output

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        if encoder_lens is not None or is_cross_attn or self._is_theirs(query, k_cache):
            return super()._run_sdpa_forward_decode(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
        plan = self._plan_of(req_to_token, req_pool_indices, seq_lens, None)
        self._attend(plan, query, output, k_cache, v_cache, scaling)
        return output

    def _plan_of(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor | None,
    ) -> StepPlan:
        plan = self._plans.get(self._layer)
        # A split prefill may go on after another batch has run, without being planned again.
        if plan is None or plan.seq_lens is not seq_lens:
            plan = self._plan(req_to_token, req_pool_indices, seq_lens, extend_seq_lens)
            self._plans[self._layer] = plan
        return plan

    def _is_theirs(self, query: torch.Tensor, k_cache: torch.Tensor) -> bool:
        """Whether torch_native's loops have to read a KV cache of another dtype."""
        if k_cache.dtype == query.dtype:
            return False
        if self._layer.is_pooled or self._sinks is not None:
            raise IncompatibleError(
                f"a KV cache in {k_cache.dtype} beside {query.dtype} is read by SGLang's "
                "torch_native on a CPU, which knows no pool of windows and no attention sinks: "
                "leave --kv-cache-dtype out"
            )
        return True

    def _plan(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor | None,
    ) -> StepPlan:
        ends = seq_lens.tolist()
        news = [1] * len(ends) if extend_seq_lens is None else extend_seq_lens.tolist()
        window = self._layer.window
        firsts = [
            0 if window is None else max(end - new - window, 0)
            for end, new in zip(ends, news, strict=True)
        ]
        contexts = [
            req_to_token[row, first:end]
            for row, first, end in zip(req_pool_indices.tolist(), firsts, ends, strict=True)
        ]
        starts = _starts(news)
        single = [i for i, new in enumerate(news) if new == 1]
        limit = _GROUP_TOKENS_PER_THREAD * torch.get_num_threads()
        spans = tuple(
            ExtendSpan(starts[i], new, self._slots(contexts[i]))
            for i, new in enumerate(news)
            if new > 1
        )
        groups = tuple(
            self._group([starts[single[j]] for j in rows], [contexts[single[j]] for j in rows])
            for rows in group_rows([len(contexts[i]) for i in single], max_tokens=limit)
        )
        return StepPlan(seq_lens, groups, spans)

    def _slots(self, slots: torch.Tensor) -> torch.Tensor:
        """The slots of the layer's own pool, of those in the rows of requests."""
        if not self._layer.is_pooled:
            return slots
        return self.token_to_kv_pool.translate_loc_from_full_to_swa(slots)

    def _group(self, rows: list[int], contexts: list[torch.Tensor]) -> DecodeGroup:
        lengths = torch.tensor([len(context) for context in contexts])
        longest, shortest = int(lengths.max()), int(lengths.min())
        slots = pad_sequence(contexts, batch_first=True)
        mask = None
        if shortest < longest:
            beyond = torch.arange(longest) >= lengths.unsqueeze(1)
            slots = torch.where(beyond, slots[:, :1], slots)
            mask = torch.zeros(slots.shape, dtype=self._dtype).masked_fill_(beyond, -torch.inf)
            mask = mask.view(len(rows), 1, 1, longest)
        return DecodeGroup(torch.tensor(rows), self._slots(slots.flatten()), mask)

    def _attend(
        self,
        plan: StepPlan,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scaling: float | None,
    ) -> None:
        for group in plan.groups:
            k, v = self._gather("k", k_cache, group.slots), self._gather("v", v_cache, group.slots)
            queries = query.index_select(0, group.rows)
            rows = _attend_group(queries, k, v, group.mask, scaling, self._sinks)
            output.index_copy_(0, group.rows, rows)
        for span in plan.spans:
            k, v = self._gather("k", k_cache, span.slots), self._gather("v", v_cache, span.slots)
            end = span.start + span.new_tokens
            self._attend_span(query[span.start : end], output[span.start : end], k, v, scaling)

    def _attend_span(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float | None,
    ) -> None:
        """Causal attention of query [P, Hq, D], the last P positions of k and v [C + P, Hkv, D]."""
        heads = (k.shape[1], query.shape[1] // k.shape[1])
        query, output = query.unflatten(1, heads), output.unflatten(1, heads)
        cached, window = k.shape[0] - query.shape[0], self._layer.window
        k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
        for start in range(0, query.shape[0], _BLOCK_ROWS):
            block = query[start : start + _BLOCK_ROWS].transpose(0, 1)
            n = block.shape[1]
            end = cached + start + n
            first = 0 if window is None else max(cached + start - window, 0)
            out = _attention(
                block.flatten(1, 2).unsqueeze(0),
                k[:, :, first:end],
                v[:, :, first:end],
                mask=self._causal_mask(n, end - first, heads[1]),
                scale=scaling,
                sinks=None if self._sinks is None else _folded(self._sinks, heads, n),
            )
            unfolded = out.squeeze(0).unflatten(1, (n, heads[1]))
            output[start : start + n].copy_(unfolded.transpose(0, 1))

    def _causal_mask(self, rows: int, seen: int, share: int) -> torch.Tensor:
        """[rows * share, seen], added to the scores: the last `rows` of `seen` positions, folded.

        A corner of one mask per `share` and window, which grows with the longest context.
        """
        kind = share, self._layer.window
        mask = self._masks.get(kind)
        if mask is None or mask.shape[1] < seen:
            mask = self._masks[kind] = _full_mask(*kind, _power_of_two(seen), self._dtype)
        return mask[-rows * share :, mask.shape[1] - seen :]

    def _gather(self, name: str, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Rows of `cache` [slots, H, D] in a buffer that the next gather of `name` overwrites."""
        elements = slots.shape[0] * cache.shape[1] * cache.shape[2]
        buffer = self._scratch.get(name)
        if buffer is None or buffer.shape[0] < elements:
            buffer = self._scratch[name] = cache.new_empty(_power_of_two(elements))
        rows = buffer[:elements].view(slots.shape[0], *cache.shape[1:])
        return torch.index_select(cache, 0, slots, out=rows)


def _as_extend(forward_batch: ForwardBatch) -> None:
    """Drafts in a chain are verified by an extend of so many tokens over what is committed."""
    if forward_batch.extend_seq_lens is None:
        committed, width = forward_batch.seq_lens, forward_batch.spec_info.draft_token_num
        forward_batch.extend_prefix_lens = committed
        forward_batch.extend_seq_lens = torch.full_like(committed, width)
        forward_batch.seq_lens = committed + width


def _attend_to_latents() -> None:
    """Have SGLang's DeepSeek models hand us queries and keys in the space of the latents, in
    prefills too: only there is what the KV pool holds all that attention needs."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        AttnForwardMethod,
    )

    AttentionBackendRegistry.register(NAME, lambda _layer, _batch: AttnForwardMethod.MLA)


def _attend_group(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of query [n, Hq, D] over k and v [n * longest, Hkv, D]; returns [n, Hq, Dv]."""
    (n, q_heads, head_dim), kv_heads = query.shape, k.shape[1]
    share = q_heads // kv_heads
    folded = query.view(n, kv_heads, share, head_dim)
    if share == 1:
        # ATen's kernel is several times slower on one bf16 query row than on two.
        folded = folded.expand(n, kv_heads, 2, head_dim)
    k, v = (x.view(n, -1, *x.shape[1:]).transpose(1, 2) for x in (k, v))
    if sinks is not None:
        sinks = sinks.view(kv_heads, share).expand(kv_heads, folded.shape[2])
    out = _attention(folded, k, v, mask=mask, scale=scaling, sinks=sinks)
    return out[:, :, :share].reshape(n, q_heads, -1)


def _attention(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scale: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of query [B, H, rows, D] over k and v [B, H, keys, D].

    Args:
        mask: added to the scores.
        sinks: [H, rows], the score of one more key, whose value is nothing.
    """
    if sinks is None:
        return scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ k.transpose(-2, -1)).float() * scale
    if mask is not None:
        scores += mask
    sink = sinks.float().view(1, *sinks.shape, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)
    return weights[..., :-1].to(v.dtype) @ v


def _folded(sinks: torch.Tensor, heads: tuple[int, int], rows: int) -> torch.Tensor:
    """[Hq] for each head, as [Hkv, rows * share] for the rows that a KV head is asked for."""
    return sinks.view(heads[0], 1, heads[1]).expand(heads[0], rows, heads[1]).flatten(1)


def _full_mask(share: int, window: int | None, width: int, dtype: torch.dtype) -> torch.Tensor:
    rows = min(_BLOCK_ROWS, width)
    hidden = torch.ones(rows, width, dtype=torch.bool).triu(width - rows + 1)
    if window is not None:
        hidden |= torch.ones(rows, width, dtype=torch.bool).tril(width - rows - window - 1)
    mask = torch.zeros(rows, width, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return mask.repeat_interleave(share, 0)


def _starts(lengths: list[int]) -> list[int]:
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts


def _power_of_two(n: int) -> int:
    return max(_BLOCK_ROWS, 1 << (n - 1).bit_length())
