"""Gated delta nets (Qwen3-Next) on a CPU: the state-space layers' kernels in tensor operations.

SGLang computes them with Triton, or with sgl_kernel on its own CPU engine; neither is here. What is
computed, for a row with state S [heads, values, keys], token by token:

    S = exp(g) S;  S += beta (v - S k) k^T;  o = S q

A state is moved by a row's tokens alone, whoever shares its step, and is exact only where SGLang
says it is: at the end of a step, and at the boundaries of chunks that it asks a snapshot of.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.linear.kernels.kernel_backend import LinearAttnKernelBase
from torch.nn import functional

__all__ = ["DeltaNetKernel", "convolve", "convolve_next", "gates", "install", "track_states"]

_CHUNK_TOKENS = 64
"""Between two states that can be asked for: the chunk of SGLang's kernels."""


def install() -> None:
    """Fill SGLang's seams in this process. Idempotent; for a process that runs such a model."""
    from sglang.kernels.ops.attention.fla.fused_norm_gate import FusedRMSNormGated
    from sglang.srt.layers.attention import hybrid_linear_attn_backend as hybrid
    from sglang.srt.layers.attention.linear import gdn_backend
    from sglang.srt.models import qwen3_next

    gdn_backend.TritonGDNKernel = DeltaNetKernel
    gdn_backend.causal_conv1d_fn = convolve
    gdn_backend.causal_conv1d_update = convolve_next
    gdn_backend.fused_gdn_gating = gates
    hybrid.track_mamba_states_all_layers = track_states
    FusedRMSNormGated.forward = _norm_gated
    qwen3_next.fused_qkvzba_split_reshape_cat = _split_projections


class DeltaNetKernel(LinearAttnKernelBase):
    """In the place of SGLang's `TritonGDNKernel`; drafts are not verified here."""

    supports_packed_decode = False
    supports_track_state_snapshot = True

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        **_theirs: Any,
    ) -> torch.Tensor:
        """One token a row.

        Args:
            q, k: [1, rows, key heads, keys]; v: [1, rows, heads, values].
            a, b: [rows, heads], of which the gates are.
            ssm_states: [slots, heads, values, keys]; those of the rows change.
            cache_indices: [rows], the slot of each.

        Returns:
            [1, rows, heads, values].
        """
        decay, beta = gates(A_log, a, b, dt_bias)
        slots = cache_indices.long()
        q, k = (_per_head(x[0], v.shape[2]) for x in (q, k))
        state = ssm_states[slots].float()
        state, out = _next_token(state, q, k, v[0].float(), decay[0], beta[0])
        ssm_states[slots] = state.to(ssm_states.dtype)
        return out[None].to(v.dtype)

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        track_state: torch.Tensor | None = None,
        track_chunk_idx: torch.Tensor | None = None,
        **_theirs: Any,
    ) -> tuple[torch.Tensor, None, None]:
        """The new tokens of several rows, one row after the other.

        Args:
            q, k, v: [1, tokens, heads, ...], as `decode` has them.
            g, beta: [1, tokens, heads]: the decay's logarithm, and how much of a token is written.
            ssm_states, cache_indices: as in `decode`. A new row's slot was cleared.
            query_start_loc: [rows + 1], where the tokens of each begin.
            track_state: [rows, heads, values, keys]; the state of a row after as many chunks as
                `track_chunk_idx` says is written there, unless that is negative.

        Returns:
            Values [1, tokens, heads, values], and nothing where SGLang's kernels return states.
        """
        heads = v.shape[2]
        q, k = (_per_head(x[0], heads) for x in (q, k))
        values, out = v[0].float(), torch.empty_like(v[0], dtype=torch.float32)
        starts, slots = query_start_loc.tolist(), cache_indices.tolist()
        tracked = [-1] * len(slots) if track_chunk_idx is None else track_chunk_idx.tolist()
        for row, slot in enumerate(slots):
            state = ssm_states[slot].float()
            for token in range(starts[row], starts[row + 1]):
                if token - starts[row] == tracked[row] * _CHUNK_TOKENS:
                    track_state[row] = state
                state, out[token] = _next_token(
                    state, q[token], k[token], values[token], g[0, token], beta[0, token]
                )
            ssm_states[slot] = state.to(ssm_states.dtype)
        return out[None].to(v.dtype), None, None


def gates(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decay's logarithm and the share written, [1, tokens, heads] each, float32, of `a` and `b`
    [tokens, heads]."""
    decay = -A_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    activation: str | None,
    conv_states: torch.Tensor,
    has_initial_state: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    **_theirs: Any,
) -> torch.Tensor:
    """A causal convolution over the new tokens of several rows.

    Args:
        x: [channels, tokens]; weight: [channels, width]; bias: [channels].
        activation: `silu` (or `swish`), or None.
        conv_states: [slots, channels, width - 1], the last inputs of each row; changed.
        has_initial_state: [rows]; a row without one begins with zeros.
        cache_indices, query_start_loc: as in `DeltaNetKernel.extend`.

    Returns:
        [channels, tokens].
    """
    starts, out = query_start_loc.tolist(), torch.empty_like(x)
    has_state = has_initial_state.tolist()
    for row, slot in enumerate(cache_indices.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        past = conv_states[slot] if has_state[row] else torch.zeros_like(conv_states[slot])
        seen = torch.cat((past.to(x.dtype), x[:, tokens]), -1)
        out[:, tokens] = functional.conv1d(seen[None], weight[:, None], bias, groups=len(x))[0]
        conv_states[slot] = seen[:, -past.shape[-1] :]
    return _activate(out, activation)


def convolve_next(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    conv_state_indices: torch.Tensor,
) -> torch.Tensor:
    """`convolve` for one more token a row: x [rows, channels], and so is what is returned."""
    slots = conv_state_indices.long()
    seen = torch.cat((conv_state[slots].to(x.dtype), x[..., None]), -1)
    conv_state[slots] = seen[..., 1:].to(conv_state.dtype)
    out = (seen * weight).sum(-1)
    return _activate(out if bias is None else out + bias, activation)


def track_states(
    conv_states_pool: torch.Tensor,
    ssm_states_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,  # noqa: ARG001  of the unified pool, which needs a GPU
) -> None:
    """Copy the states of the rows that `mamba_track_mask` [rows] names to the slots of
    `mamba_track_indices`, in all layers: pools [layers, slots, ...]."""
    rows = mamba_track_mask[:batch_size].nonzero().flatten()
    if not len(rows):
        return
    src, dst = cache_indices[rows].long(), mamba_track_indices[rows].long()
    for pool in (conv_states_pool, ssm_states_pool):
        pool[:, dst] = pool[:, src]


def _next_token(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state [..., heads, values, keys] after a token, and what the token gets, which is
    scaled by the root of the keys' width."""
    state = state * decay.exp()[..., None, None]
    known = (state * k[..., None, :]).sum(-1)
    state = state + ((v - known) * beta[..., None])[..., None] * k[..., None, :]
    return state, (state * q[..., None, :]).sum(-1) * q.shape[-1] ** -0.5


def _per_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries or keys [tokens, key heads, keys] as each of `heads` takes them, of length one."""
    x = x.float()
    x = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    return x.repeat_interleave(heads // x.shape[1], 1)


def _norm_gated(
    self: Any, x: torch.Tensor, g: torch.Tensor, *_args: Any, **_kwargs: Any
) -> torch.Tensor:
    # `FusedRMSNormGated.forward`, without the residual stream, which no model here gives it.
    normed = x.float() * (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()
    gate = g.float().sigmoid() if self.activation == "sigmoid" else functional.silu(g.float())
    return (normed * self.weight.float() * gate).to(x.dtype)


def _split_projections(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two projections, which come by key head, as [q k v], z, b and a."""
    tokens, share = len(mixed_qkvz), num_heads_v // num_heads_qk
    q, k, v, z = mixed_qkvz.view(tokens, num_heads_qk, -1).split(
        [head_qk, head_qk, share * head_v, share * head_v], -1
    )
    b, a = mixed_ba.view(tokens, num_heads_qk, 2 * share).split(share, -1)
    mixed_qkv = torch.cat([part.reshape(tokens, -1) for part in (q, k, v)], -1)
    z = z.reshape(tokens, num_heads_v, head_v)
    return mixed_qkv, z, b.reshape(tokens, -1), a.reshape(tokens, -1)


def _activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    return x if activation is None else functional.silu(x)
