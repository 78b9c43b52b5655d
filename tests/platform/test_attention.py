"""The CPU attention backend against a naive fp32 reference and against torch_native."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from conserve_sgl.platform.attention import CpuAttnBackend, group_rows

HEAD_DIM = 16
POOL_SLOTS = 8192
HEADS = [(4, 4), (9, 3), (8, 2), (6, 1)]


class FakePool:
    """One layer of KV, random in every slot, as a real pool's is after some traffic."""

    def __init__(self, kv_heads: int, dtype: torch.dtype) -> None:
        self.k = torch.randn(POOL_SLOTS, kv_heads, HEAD_DIM, dtype=dtype)
        self.v = torch.randn(POOL_SLOTS, kv_heads, HEAD_DIM, dtype=dtype)

    def get_key_buffer(self, _layer_id: int) -> torch.Tensor:
        return self.k

    def get_value_buffer(self, _layer_id: int) -> torch.Tensor:
        return self.v

    def set_kv_buffer(self, _layer, loc, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k[loc.loc] = k
        self.v[loc.loc] = v


class FakeWindowPool(FakePool, SWAKVPool):
    """A pool of windows, whose slots are others than those in the rows of requests."""

    def __init__(self, kv_heads: int, dtype: torch.dtype) -> None:
        FakePool.__init__(self, kv_heads, dtype)
        self.swa_layer_nums = 1
        self.layers_mapping = {0: (0, True)}
        self.of_windows = torch.randperm(POOL_SLOTS)

    def translate_loc_from_full_to_swa(self, kv_indices: torch.Tensor) -> torch.Tensor:
        return self.of_windows[kv_indices]

    def set_kv_buffer(self, _layer, loc, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k[loc.swa_loc] = k
        self.v[loc.swa_loc] = v


@dataclass
class Case:
    """One batch: `batch` is what SGLang hands a backend, the rest is for the reference."""

    runner: SimpleNamespace
    layer: SimpleNamespace
    batch: SimpleNamespace
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def run(self, backend_cls: type) -> torch.Tensor:
        backend = backend_cls(self.runner)
        backend.init_forward_metadata(self.batch)
        return self.forward(backend)

    def forward(self, backend: TorchNativeAttnBackend, **known: torch.Tensor) -> torch.Tensor:
        decode = self.batch.forward_mode == ForwardMode.DECODE
        forward = backend.forward_decode if decode else backend.forward_extend
        return forward(self.q, self.k, self.v, self.layer, self.batch, **known)


def make_case(
    mode: ForwardMode,
    requests: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (9, 3),
    dtype: torch.dtype = torch.float32,
    window: int = -1,
) -> Case:
    """A batch of (cached, new) tokens per request, its slots scattered over the pool."""
    torch.manual_seed(0)
    q_heads, kv_heads = heads
    rows = sum(new for _, new in requests)
    longest = max(cached + new for cached, new in requests)
    table = torch.randint(1, POOL_SLOTS, (len(requests) + 3, longest + 5), dtype=torch.int32)
    slots = (torch.randperm(POOL_SLOTS - 1, dtype=torch.int32) + 1).tolist()
    pool_rows = torch.randperm(len(requests) + 3)[: len(requests)]
    written = []
    for row, (cached, new) in zip(pool_rows.tolist(), requests, strict=True):
        own = [slots.pop() for _ in range(cached + new)]
        table[row, : cached + new] = torch.tensor(own, dtype=torch.int32)
        written += own[cached:]
    runner = SimpleNamespace(
        device="cpu",
        dtype=dtype,
        use_mla_backend=False,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool=FakePool(kv_heads, dtype),
    )
    layer = SimpleNamespace(
        layer_id=0,
        qk_head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        tp_q_head_num=q_heads,
        tp_k_head_num=kv_heads,
        scaling=HEAD_DIM**-0.5,
        is_cross_attention=False,
        sliding_window_size=window,
        attn_type=AttentionType.DECODER,
    )
    batch = SimpleNamespace(
        forward_mode=mode,
        req_pool_indices=pool_rows,
        seq_lens=torch.tensor([cached + new for cached, new in requests]),
        extend_prefix_lens=torch.tensor([cached for cached, _ in requests]),
        extend_seq_lens=torch.tensor([new for _, new in requests]),
        encoder_lens=None,
        out_cache_loc=torch.tensor(written),
    )
    q, k, v = (torch.randn(rows, n * HEAD_DIM, dtype=dtype) for n in (q_heads, kv_heads, kv_heads))
    kv_shape = (rows, kv_heads, HEAD_DIM)
    return Case(runner, layer, batch, q, k.view(kv_shape), v.view(kv_shape))


def reference(case: Case, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention written out, one query row at a time; call after the KV was written."""
    pool, table = case.runner.token_to_kv_pool, case.runner.req_to_token_pool.req_to_token
    q = case.q.float().view(-1, case.layer.tp_q_head_num, HEAD_DIM)
    out, row = [], 0
    for i, request in enumerate(case.batch.req_pool_indices.tolist()):
        context, new = int(case.batch.seq_lens[i]), int(case.batch.extend_seq_lens[i])
        for position in range(context - new, context):
            window = case.layer.sliding_window_size
            first = 0 if window < 0 else max(position - window, 0)
            slots = table[request, first : position + 1].long()
            if isinstance(pool, FakeWindowPool):
                slots = pool.of_windows[slots]
            out.append(_attend_one(q[row], pool.k[slots].float(), pool.v[slots].float(), sinks))
            row += 1
    return torch.stack(out).flatten(1)


def _attend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    share = q.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("hd,thd->ht", q, k).mul(HEAD_DIM**-0.5).exp()
    sums = scores.sum(1) + (0 if sinks is None else sinks.exp())
    return torch.einsum("ht,thd->hd", scores / sums[:, None], v)


EXTENDS = [
    pytest.param([(0, 7)], id="one"),
    pytest.param([(0, 300)], id="several-blocks"),
    pytest.param([(0, 128)], id="one-block"),
    pytest.param([(1, 129)], id="prefix-1"),
    pytest.param([(513, 3)], id="long-prefix"),
    pytest.param([(700, 260), (0, 5), (64, 64)], id="requests"),
    pytest.param([(40, 1)], id="one-token"),
]
MIXED = [
    pytest.param([(0, 150), (30, 1), (5, 1), (200, 1)], id="prefill-first"),
    pytest.param([(30, 1), (9, 140), (1, 1), (0, 1), (2, 20), (77, 1)], id="interleaved"),
]
DECODES = [
    pytest.param([(0, 1)], id="first-token"),
    pytest.param([(31, 1)] * 8, id="equal"),
    pytest.param([(n, 1) for n in (3, 1800, 0, 64, 64, 700, 5)], id="far-apart"),
    pytest.param([(n, 1) for n in range(1, 65)], id="64"),
]


def _check(case: Case) -> None:
    ours = case.run(CpuAttnBackend)
    torch.testing.assert_close(ours, reference(case), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, case.run(TorchNativeAttnBackend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("requests", EXTENDS)
def test_extend(requests: list, heads: tuple) -> None:
    _check(make_case(ForwardMode.EXTEND, requests, heads=heads))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("requests", MIXED)
def test_decode_rows_beside_prefill(requests: list, heads: tuple) -> None:
    _check(make_case(ForwardMode.MIXED, requests, heads=heads))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("requests", DECODES)
def test_decode(requests: list, heads: tuple) -> None:
    _check(make_case(ForwardMode.DECODE, requests, heads=heads))


@pytest.mark.parametrize("heads", HEADS)
def test_drafts_are_verified_as_an_extend(heads: tuple) -> None:
    """SGLang hands over the committed lengths, and how many tokens each row verifies."""
    case = make_case(ForwardMode.EXTEND, [(90, 5), (0, 5), (300, 5)], heads=heads)
    batch = case.batch
    wanted = case.run(CpuAttnBackend)
    batch.seq_lens = batch.extend_prefix_lens
    batch.extend_prefix_lens = batch.extend_seq_lens = None
    batch.forward_mode = ForwardMode.TARGET_VERIFY
    batch.spec_info = SimpleNamespace(draft_token_num=5)
    torch.testing.assert_close(case.run(CpuAttnBackend), wanted)


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DECODE])
def test_bfloat16_is_as_near_as_torch_native(mode: ForwardMode) -> None:
    requests = [(90, 1), (300, 1)] if mode == ForwardMode.DECODE else [(90, 40), (17, 1)]
    case = make_case(mode, requests, dtype=torch.bfloat16)
    ours, theirs = case.run(CpuAttnBackend), case.run(TorchNativeAttnBackend)
    wanted = reference(case)
    error = (ours.float() - wanted).abs().max()
    assert error <= 2 * (theirs.float() - wanted).abs().max()


def test_every_layer_of_a_step_reads_its_own_kv() -> None:
    case = make_case(ForwardMode.DECODE, [(50, 1), (9, 1)])
    backend = CpuAttnBackend(case.runner)
    backend.init_forward_metadata(case.batch)
    first = case.forward(backend)
    backend.token_to_kv_pool.v.neg_()
    case.v.neg_()
    torch.testing.assert_close(case.forward(backend), -first)


def test_a_split_prefill_goes_on_after_another_batch_without_a_new_plan() -> None:
    suspended = make_case(ForwardMode.SPLIT_PREFILL, [(20, 30), (0, 1)])
    other = make_case(ForwardMode.DECODE, [(200, 1)])
    backend = CpuAttnBackend(suspended.runner)
    backend.init_forward_metadata(suspended.batch)
    backend.init_forward_metadata(other.batch)
    torch.testing.assert_close(
        suspended.forward(backend), reference(suspended), rtol=1e-5, atol=1e-5
    )


def test_a_reused_backend_forgets_the_batch_before() -> None:
    long, short = (make_case(ForwardMode.EXTEND, [(600, n)]) for n in (200, 3))
    backend = CpuAttnBackend(long.runner)
    for case in (long, short, long):
        backend.token_to_kv_pool = case.runner.token_to_kv_pool
        backend.req_to_token_pool = case.runner.req_to_token_pool
        backend.init_forward_metadata(case.batch)
        torch.testing.assert_close(case.forward(backend), reference(case), rtol=1e-5, atol=1e-5)


def test_slots_beyond_a_context_do_not_leak_even_if_they_are_not_numbers() -> None:
    case = make_case(ForwardMode.DECODE, [(300, 1), (3, 1)])
    table, pool = case.runner.req_to_token_pool.req_to_token, case.runner.token_to_kv_pool
    poisoned = table[case.batch.req_pool_indices[1], 4:].long()
    poisoned = poisoned[~torch.isin(poisoned, table[case.batch.req_pool_indices[0], :301])]
    pool.k[poisoned] = pool.v[poisoned] = torch.nan
    assert case.run(CpuAttnBackend).isfinite().all()


STEPS = [
    pytest.param(ForwardMode.EXTEND, [(0, 300), (64, 3), (5, 2)], id="extend"),
    pytest.param(ForwardMode.MIXED, [(30, 140), (9, 1), (300, 1)], id="mixed"),
    pytest.param(ForwardMode.DECODE, [(300, 1), (2, 1), (8, 1), (9, 1)], id="decode"),
]


@pytest.mark.parametrize("window", [0, 8, 130, 1000])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("mode", "requests"), STEPS)
def test_a_sliding_window(mode, requests, heads, window) -> None:
    _check(make_case(mode, requests, heads=heads, window=window))


@pytest.mark.parametrize(("mode", "requests"), STEPS)
def test_windows_have_a_pool_of_their_own(mode, requests) -> None:
    case = make_case(mode, requests, window=8)
    case.runner.token_to_kv_pool = FakeWindowPool(3, torch.float32)
    torch.testing.assert_close(case.run(CpuAttnBackend), reference(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [-1, 8])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("mode", "requests"), STEPS)
def test_sinks_take_a_share_of_the_attention(mode, requests, heads, window) -> None:
    case = make_case(mode, requests, heads=heads, window=window)
    sinks = torch.randn(heads[0])
    backend = CpuAttnBackend(case.runner)
    backend.init_forward_metadata(case.batch)
    ours = case.forward(backend, sinks=sinks)
    torch.testing.assert_close(ours, reference(case, sinks), rtol=1e-5, atol=1e-5)


def test_layers_with_windows_and_without_take_turns() -> None:
    case = make_case(ForwardMode.DECODE, [(300, 1), (2, 1)])
    backend = CpuAttnBackend(case.runner)
    backend.init_forward_metadata(case.batch)
    for window in (-1, 8, -1, 100):
        case.layer.sliding_window_size = window
        ours = case.forward(backend)
        torch.testing.assert_close(ours, reference(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "requests"),
    [
        (ForwardMode.EXTEND, [(0, 150), (64, 3)]),
        (ForwardMode.MIXED, [(30, 140), (9, 1)]),
        (ForwardMode.DECODE, [(300, 1), (2, 1)]),
    ],
)
def test_latent_attention_has_values_that_are_part_of_its_keys(mode, requests) -> None:
    case = make_case(mode, requests, heads=(6, 1))
    pool, latent = case.runner.token_to_kv_pool, HEAD_DIM // 2
    case.layer.v_head_dim = latent
    pool.v, case.v = pool.k[..., :latent], case.k[..., :latent]
    _check(case)


def test_groups_hold_every_row_once_within_their_bounds() -> None:
    lengths = [1, 5000, 64, 64, 2000, 1990, 7, 4096, 300]
    groups = list(group_rows(lengths, max_tokens=4096))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert len(group) == 1 or len(group) * longest <= 4096


def test_rows_of_one_length_share_a_group() -> None:
    assert len(list(group_rows([256] * 16, max_tokens=4096))) == 1


def test_a_short_row_is_not_padded_to_a_long_one() -> None:
    assert len(list(group_rows([4000, 10], max_tokens=100_000))) == 2
