"""The kernels of gated delta nets, against transformers' and against themselves in parts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from conserve_sgl.platform import delta_net
from conserve_sgl.platform.delta_net import DeltaNetKernel, convolve, convolve_next, gates

KEY_HEADS, HEADS, KEYS, VALUES, CHUNK = 2, 4, 8, 12, 64
LENGTHS = (70, 1, 130)
SLOTS = torch.tensor([5, 2, 4])
CHANNELS, WIDTH = 6, 4


class Rows:
    """Random tokens of three rows, and slots for more; each row has its own past."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        tokens = sum(LENGTHS)
        self.q, self.k = (torch.randn(1, tokens, KEY_HEADS, KEYS) for _ in "qk")
        self.v = torch.randn(1, tokens, HEADS, VALUES)
        self.a, self.b = (torch.randn(tokens, HEADS) for _ in "ab")
        self.A_log, self.dt_bias = torch.randn(HEADS) - 3, torch.randn(HEADS)
        self.g, self.beta = gates(self.A_log, self.a, self.b, self.dt_bias)
        self.states = torch.randn(8, HEADS, VALUES, KEYS)
        self.starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
        self.x = torch.randn(CHANNELS, tokens)
        self.weight, self.bias = torch.randn(CHANNELS, WIDTH), torch.randn(CHANNELS)
        self.conv_states = torch.randn(8, CHANNELS, WIDTH - 1)

    def extend(self, **tracked: torch.Tensor) -> torch.Tensor:
        out, *_ = DeltaNetKernel().extend(
            self.q,
            self.k,
            self.v,
            self.g,
            self.beta,
            ssm_states=self.states,
            cache_indices=SLOTS,
            query_start_loc=self.starts,
            **tracked,
        )
        return out

    def theirs(self, row: int, state: torch.Tensor, tokens: int) -> tuple[torch.Tensor, ...]:
        """What transformers gives the first tokens of a row, and the state after them."""
        part = slice(self.starts[row], self.starts[row] + tokens)
        share = HEADS // KEY_HEADS
        out, state = theirs.torch_recurrent_gated_delta_rule(
            self.q[:, part].repeat_interleave(share, 2),
            self.k[:, part].repeat_interleave(share, 2),
            self.v[:, part],
            g=self.g[:, part],
            beta=self.beta[:, part],
            initial_state=state.transpose(-1, -2)[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return out, state[0].transpose(-1, -2)


@pytest.fixture
def rows() -> Rows:
    return Rows()


def test_new_tokens_go_on_from_the_state_of_their_row(rows):
    before = rows.states.clone()
    out = rows.extend()
    for row, slot in enumerate(SLOTS.tolist()):
        expected, state = rows.theirs(row, before[slot], LENGTHS[row])
        part = slice(rows.starts[row], rows.starts[row + 1])
        torch.testing.assert_close(out[:, part], expected)
        torch.testing.assert_close(rows.states[slot], state)
    others = [slot for slot in range(8) if slot not in SLOTS]
    assert torch.equal(rows.states[others], before[others])


def test_a_state_is_kept_at_the_chunk_that_is_asked_for(rows):
    before = rows.states.clone()
    kept = torch.zeros(3, HEADS, VALUES, KEYS)
    rows.extend(track_state=kept, track_chunk_idx=torch.tensor([1, -1, 2], dtype=torch.int32))
    for row, chunks in ((0, 1), (2, 2)):
        _, state = rows.theirs(row, before[SLOTS[row]], chunks * CHUNK)
        torch.testing.assert_close(kept[row], state)
    assert not kept[1].any()


def test_a_token_of_each_row_is_a_step(rows):
    first = rows.starts[:-1].long()
    before = rows.states.clone()
    out = DeltaNetKernel().decode(
        rows.q[:, first],
        rows.k[:, first],
        rows.v[:, first],
        rows.a[first],
        rows.b[first],
        A_log=rows.A_log,
        dt_bias=rows.dt_bias,
        ssm_states=rows.states,
        cache_indices=SLOTS,
        query_start_loc=None,
    )
    for row, slot in enumerate(SLOTS.tolist()):
        expected, state = rows.theirs(row, before[slot], 1)
        torch.testing.assert_close(out[:, row : row + 1], expected)
        torch.testing.assert_close(rows.states[slot], state)


def test_a_convolution_sees_the_last_inputs_of_its_row(rows):
    before = rows.conv_states.clone()
    out = convolve(
        rows.x,
        rows.weight,
        rows.bias,
        activation="silu",
        conv_states=rows.conv_states,
        has_initial_state=torch.tensor([True, True, False]),
        cache_indices=SLOTS,
        query_start_loc=rows.starts,
        seq_lens_cpu=list(LENGTHS),
    )
    for row, slot in enumerate(SLOTS.tolist()):
        part = slice(rows.starts[row], rows.starts[row + 1])
        past = before[slot] if row < 2 else torch.zeros(CHANNELS, WIDTH - 1)
        seen = torch.cat((past, rows.x[:, part]), -1)
        windows = seen.unfold(-1, WIDTH, 1)  # [channels, tokens, width]
        expected = functional.silu((windows * rows.weight[:, None]).sum(-1) + rows.bias[:, None])
        torch.testing.assert_close(out[:, part], expected)
        assert torch.equal(rows.conv_states[slot], seen[:, -(WIDTH - 1) :])


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_convolution_of_one_token_a_row_is_the_same(rows, has_bias):
    bias = rows.bias if has_bias else None
    first = rows.starts[:-1].long()
    at_once, states = rows.conv_states.clone(), rows.conv_states
    expected = convolve(
        rows.x[:, first],
        rows.weight,
        bias,
        activation="silu",
        conv_states=at_once,
        has_initial_state=torch.ones(3, dtype=torch.bool),
        cache_indices=SLOTS,
        query_start_loc=torch.arange(4),
    )
    out = convolve_next(
        rows.x[:, first].T, states, rows.weight, bias, "silu", conv_state_indices=SLOTS
    )
    torch.testing.assert_close(out, expected.T)
    assert torch.equal(states, at_once)


def test_states_are_copied_where_they_are_asked_for():
    torch.manual_seed(0)
    conv, ssm = torch.randn(2, 8, CHANNELS, WIDTH - 1), torch.randn(2, 8, HEADS, VALUES, KEYS)
    before = conv.clone(), ssm.clone()
    mask = torch.tensor([True, False, True])
    delta_net.track_states(conv, ssm, SLOTS, mask, torch.tensor([7, 6, 1]), 3)
    for pool, old in zip((conv, ssm), before, strict=True):
        assert torch.equal(pool[:, [7, 1]], old[:, [5, 4]])
        assert torch.equal(pool[:, [0, 2, 3, 4, 5, 6]], old[:, [0, 2, 3, 4, 5, 6]])


def test_projections_are_split_as_the_model_splits_them():
    share, tokens = HEADS // KEY_HEADS, 3
    qkvz = torch.randn(tokens, KEY_HEADS * (2 * KEYS + 2 * share * VALUES))
    ba = torch.randn(tokens, 2 * HEADS)
    layer = SimpleNamespace(
        num_k_heads=KEY_HEADS, num_v_heads=HEADS, head_k_dim=KEYS, head_v_dim=VALUES
    )
    split = theirs.Qwen3NextGatedDeltaNet.fix_query_key_value_ordering
    *qkv, z, b, a = (part[0] for part in split(layer, qkvz[None], ba[None]))
    found = delta_net._split_projections(qkvz, ba, KEY_HEADS, HEADS, KEYS, VALUES)
    expected = torch.cat([part.flatten(1) for part in qkv], -1), z, b, a
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_the_norm_is_gated(activation):
    x, gate, weight = torch.randn(5, VALUES), torch.randn(5, VALUES), torch.randn(VALUES)
    norm = SimpleNamespace(weight=weight, eps=1e-6, activation=activation)
    gated = functional.silu(gate) if activation == "silu" else gate.sigmoid()
    expected = functional.rms_norm(x, (VALUES,), weight, 1e-6) * gated
    torch.testing.assert_close(delta_net._norm_gated(norm, x, gate), expected)
