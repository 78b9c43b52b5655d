"""A model-free engine around SGLang's own radix tree: what a row's KV holds decides its tokens.

The KV of a token is a fingerprint of all tokens up to it, and the next token a function of the KV
that the row points to. KV that is lost, stale or somebody else's therefore changes the output. So
does a state, which is the fingerprint of all tokens that it was taken through, one after the other.
"""

from __future__ import annotations

import zlib
from array import array
from types import SimpleNamespace

import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.mem_cache.allocation import ensure_mamba_capacity
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.memory_pool import (
    HybridReqToTokenPool,
    MHATokenToKVPool,
    ReqToTokenPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from conserve_sgl.checkpoint.checkpointer import Checkpointer
from conserve_sgl.checkpoint.kv_pools import KvPools
from conserve_sgl.checkpoint.ownership import check_ownership
from conserve_sgl.config import CheckpointConfig
from conserve_sgl.platform import hicache

__all__ = ["GRID", "OFFLINE", "ONLINE", "Kernel", "make_request", "next_token"]

_VOCAB = 50_000
OFFLINE, ONLINE = -1, 0  # priorities
TOKEN_BYTES = 8
"""Keys and values of one float each."""

GRID = 8
"""Tokens between two positions at which a state is copied beside the steps."""


def next_token(fingerprint: float) -> int:
    """The token after a context whose last KV is `fingerprint`."""
    return int(fingerprint) * 31 % _VOCAB


def _fingerprint(tokens: array) -> float:
    return float(zlib.crc32(tokens.tobytes()) & 0xFFFFFF)  # exact in a float32


def _fingerprints(tokens: array) -> list[float]:
    """`_fingerprint` of each token and all before it, each from the one before."""
    octets, crc, found = tokens.tobytes(), 0, []
    for at in range(0, len(octets), tokens.itemsize):
        crc = zlib.crc32(octets[at : at + tokens.itemsize], crc)
        found.append(float(crc & 0xFFFFFF))
    return found


def _next_state(state: float, token: int) -> float:
    return float(zlib.crc32(token.to_bytes(8, "little"), int(state)) & 0xFFFFFF)


def _state_of(tokens: array) -> float:
    state = 0.0
    for token in tokens:
        state = _next_state(state, token)
    return state


def make_request(rid: str, prompt: list[int], output_tokens: int) -> Req:
    sampling = SamplingParams(max_new_tokens=output_tokens)
    return Req(rid, "", array("q", prompt), sampling, priority=OFFLINE)


def _one_pool(tokens: int) -> TokenToKVPoolAllocator:
    pool = MHATokenToKVPool(
        size=tokens,
        page_size=1,
        dtype=torch.float32,
        head_num=1,
        head_dim=1,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    return TokenToKVPoolAllocator(
        size=tokens, dtype=torch.float32, device="cpu", kvcache=pool, need_sort=False
    )


def _two_pools(tokens: int, window_tokens: int) -> SWATokenToKVPoolAllocator:
    pool = SWAKVPool(
        size=tokens,
        size_swa=window_tokens,
        page_size=1,
        dtype=torch.float32,
        head_num=1,
        head_dim=1,
        full_attention_layer_ids=[0],
        swa_attention_layer_ids=[1],
        device="cpu",
    )
    return SWATokenToKVPoolAllocator(
        size=tokens,
        size_swa=window_tokens,
        page_size=1,
        dtype=torch.float32,
        device="cpu",
        kvcache=pool,
        need_sort=False,
    )


def _rows(rows: int, state_slots: int, *, copies: bool) -> ReqToTokenPool:
    if not state_slots:
        return ReqToTokenPool(
            size=rows, max_context_len=1024, device="cpu", enable_memory_saver=False
        )
    shape = SimpleNamespace(conv=[(1, 1)], temporal=(1, 1, 1))
    dtype = Mamba2StateDType(conv=torch.float32, temporal=torch.float32)
    return HybridReqToTokenPool(
        size=rows,
        mamba_size=state_slots,
        mamba_spec_state_size=0,
        max_context_len=1024,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, dtype=dtype, layers=[0]),
        mamba_layer_ids=[0],
        enable_mamba_extra_buffer=copies,
        enable_overlap_schedule=False,
    )


class Kernel:
    """Rows, a KV pool and a tree, and a Checkpointer over them.

    Args:
        kv_tokens: size of the device pool.
        rows: requests that may run at a time.
        config: of the Checkpointer.
        host_ratio: size of HiCache's host pool over the device pool; None is without HiCache.
        token_s: what computing a token would take; with little, copies to the host do not pay.
        window: tokens before its own that a token sees in a second layer, which has a pool of three
            quarters of the size; None is without one.
        state_slots: of a third layer, which has a state; 0 is without one.
        copies_states: the strategy `extra_buffer`, with a copy every GRID tokens; else `no_buffer`.
    """

    def __init__(
        self,
        *,
        kv_tokens: int,
        rows: int,
        config: CheckpointConfig,
        host_ratio: float | None,
        token_s: float = 1e-4,
        window: int | None = None,
        state_slots: int = 0,
        copies_states: bool = False,
    ) -> None:
        args = ServerArgs(
            model_path="dummy",
            page_size=1,
            enable_hierarchical_cache=host_ratio is not None,
            hicache_ratio=host_ratio,
            hicache_write_policy="write_through",
            hicache_io_backend="direct",
            hicache_mem_layout="layer_first",
            mamba_track_interval=GRID,
        )
        args._mamba_cache_chunk_size = GRID  # a dummy model has no config to take it from
        set_global_server_args_for_scheduler(args)
        self.rows = _rows(rows, state_slots, copies=copies_states)
        self.state_slots, self.copies_states = state_slots, copies_states
        self.window = window
        components = (ComponentType.FULL,)
        if window is None:
            self.allocator = _one_pool(kv_tokens)
        else:
            self.allocator = _two_pools(kv_tokens, kv_tokens * 3 // 4)
            components = (ComponentType.FULL, ComponentType.SWA)
        if state_slots:
            components = (*components, ComponentType.MAMBA)
        self.pool = self.allocator.get_kvcache()
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
            tree_components=components,
            sliding_window_size=window,
            enable_mamba_extra_buffer=copies_states,
        )
        self.tree = UnifiedRadixCache(params)
        if host_ratio is not None:
            hicache.install()
            self.tree.init_hicache(args, params)
        self.kv_tokens = kv_tokens
        self.last_waits_for = -1  # the load that the last prefill waits for
        self.checkpoints = Checkpointer(
            self.tree,
            config,
            enabled=config.enabled,
            copies=config.enabled and host_ratio is not None and not state_slots,
            max_total_tokens=kv_tokens,
            token_bytes=TOKEN_BYTES,
            is_offline=lambda req: req.priority == OFFLINE,
        )
        self.checkpoints.token_s = token_s

    @property
    def kv(self) -> torch.Tensor:
        """The fingerprint in every slot."""
        return self.pool.get_key_buffer(0).view(-1)

    @property
    def kv_of_windows(self) -> torch.Tensor:
        """The same in the pool of the windows."""
        return self.pool.get_key_buffer(1).view(-1)

    def prefill(self, req: Req) -> bool:
        """Admit `req` and compute what the tree has not; False when it does not fit."""
        self.poll()
        if self.checkpoints.states.free_rows < 1:
            return False  # as admission does: SGLang takes a slot as it looks a request up
        req.init_next_round_input(self.tree)
        load = self._load_back(req) if req.needs_host_load_back() else -1
        req.lock = self.tree.lock(req.last_node)
        found = req.prefix_len
        slots = self._take(req.seqlen - found)
        states = ensure_mamba_capacity(self.rows, [req], self.tree)
        if slots is None or not states or self.rows.alloc([req]) is None:
            if slots is not None:
                self.allocator.free(slots)
            self.tree.unlock(req.lock)
            req.lock = None
            self.checkpoints.states.take_back(req)
            return False
        self._begin_state(req, found)
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        row[:found] = self.tree.prefix_device_indices(req).int()
        row[found : req.seqlen] = slots.int()
        self._compute(req, found, req.seqlen)
        req.kv.kv_committed_len = req.kv.kv_allocated_len = req.extend_end = req.seqlen
        req.is_retracted = False
        penalties = SimpleNamespace(is_required=False)
        batch = SimpleNamespace(
            reqs=[req],
            decoding_reqs=None,
            sampling_info=SimpleNamespace(penalizer_orchestrator=penalties),
            hicache_consumer_index=load,
        )
        self.checkpoints.admitted(batch, lagging=False)
        self.last_waits_for = batch.hicache_consumer_index
        checkpoint_kv_cache(req, self.tree)
        self._sample(req)
        return True

    def _load_back(self, req: Req) -> int:
        loaded, req.last_node = self.tree.init_load_back(
            InitLoadBackParams(req.best_match_node, req.host_hit_length, req=req)
        )
        req.prefix_len += loaded
        req.kv.cache_protected_len = req.prefix_len
        return self.tree.ready_to_load_host_cache()

    def poll(self) -> None:
        """Start the copies that are queued, and take note of those that are done."""
        if self.tree.cache_controller is not None:
            self.tree.check_hicache_events()

    def decode(self, reqs: list[Req]) -> bool:
        """One token for each; False, and nothing changes, when the KV pool is full."""
        self.poll()
        for req in reqs:
            if self.window is not None:  # before each step, as `ScheduleBatch.maybe_evict_swa`
                self.tree.evict_sliding_windows(req, req.seqlen - 1)
        slots = self._take(len(reqs))
        if slots is None:
            return False
        for req, slot in zip(reqs, slots, strict=True):
            end = req.seqlen
            self.rows.req_to_token[req.kv.req_pool_idx, end - 1] = slot
            req.kv.kv_committed_len = req.kv.kv_allocated_len = end
            self._compute(req, end - 1, end)
            self._sample(req)
        self.checkpoints.after_result(
            SimpleNamespace(forward_mode=ForwardMode.DECODE, reqs=reqs), online_tight=False
        )
        check_ownership(reqs, self.tree)
        return True

    def finish(self, req: Req) -> None:
        """End `req` as SGLang does, and leave what it computed to the tree."""
        req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
        release_kv_cache(req, self.tree, checkpoint=True)

    def evict(self, tokens: int) -> None:
        """Take KV from the tree that no request locks."""
        of_windows = 0 if self.window is None else tokens
        self.tree.evict(EvictParams(num_tokens=tokens, swa_num_tokens=of_windows))

    def room(self) -> int:
        """KV tokens that are free or can be evicted."""
        return KvPools(self.tree).free_tokens

    def load_ahead(self, reqs: list[Req]) -> list[Req]:
        """Those that wait for their KV."""
        return self.checkpoints.load_ahead(reqs, self.room())

    def assert_balanced(self) -> None:
        """No request is left, and every slot, the host's too, is free or can be evicted."""
        self.poll()
        self.poll()  # what the first one started is done by now
        assert self.tree.protected_size() == 0
        assert self.room() == self.kv_tokens
        if self.window is not None:
            assert self.tree.swa_protected_size() == 0
            assert KvPools(self.tree).free_window_tokens == self.allocator.size_swa
        if self.state_slots:
            assert self.tree.mamba_protected_size() == 0
            assert self.checkpoints.states.free == self.state_slots
        self.tree.sanity_check()
        if self.tree.cache_controller is not None:
            host = self.tree.cache_controller.mem_pool_host
            self.evict(self.kv_tokens)
            self.tree.evict_host(host.size)
            assert host.available_size() == host.size
            if self.window is not None:
                host = self.tree.host_pool_group.get_pool(PoolName.SWA)
                assert host.available_size() == host.size

    def _take(self, tokens: int) -> torch.Tensor | None:
        short = tokens - self.allocator.available_size()
        if short > 0:
            self.evict(short)
        return self.allocator.alloc(tokens)

    def _compute(self, req: Req, start: int, end: int) -> None:
        tokens = req.origin_input_ids + req.output_ids
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        for position in range(start, end):
            self.kv[row[position]] = _fingerprint(tokens[: position + 1])
            if self.window is not None:
                slot = self.allocator.translate_loc_from_full_to_swa(row[position : position + 1])
                self.kv_of_windows[slot] = _fingerprint(tokens[: position + 1])

            if self.state_slots:
                self._move_state(req, tokens[position], position + 1)

    def _begin_state(self, req: Req, found: int) -> None:
        """Give a new row the state that was found, as a forward pass begins."""
        kv, pool = req.kv, self.rows
        if not self.state_slots:
            return
        if kv.mamba_cow_src_index is not None:
            pool.copy_mamba_state(kv.mamba_cow_src_index, kv.mamba_pool_idx.unsqueeze(0))
        else:
            assert found == 0
            pool.mamba_pool.clear_slots(kv.mamba_pool_idx.unsqueeze(0))
        kv.mamba_cow_src_index, kv.mamba_needs_clear = None, False

    def _move_state(self, req: Req, token: int, position: int) -> None:
        kv, states = req.kv, self.rows.mamba_pool.mamba_cache.temporal[0]
        slot = int(kv.mamba_pool_idx)
        states[slot] = _next_state(states[slot].item(), token)
        if self.copies_states and position % GRID == 0:
            self.rows.copy_mamba_state(
                kv.mamba_pool_idx.unsqueeze(0), kv.mamba_ping_pong_track_buffer
            )
            kv.mamba_last_track_idx = kv.mamba_next_track_idx
            kv.mamba_last_track_seqlen = position

    def _sample(self, req: Req) -> None:
        row = self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_committed_len]
        seen = self.kv[row.long()]
        tokens = req.origin_input_ids + req.output_ids
        right = _fingerprints(tokens)
        wrong = sum(a != b for a, b in zip(seen.tolist(), right, strict=True))
        if self.window is not None:
            slots = self.allocator.translate_loc_from_full_to_swa(row[-self.window - 1 :])
            seen_in_window = self.kv_of_windows[slots].tolist()
            right = right[-self.window - 1 :]
            wrong += sum(a != b for a, b in zip(seen_in_window, right, strict=True))
        if self.state_slots:
            state = self.rows.mamba_pool.mamba_cache.temporal[0, int(req.kv.mamba_pool_idx)]
            wrong += state.item() != _state_of(tokens)
        req.output_ids.append(next_token(seen[-1].item()) + wrong)
