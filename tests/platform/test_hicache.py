"""The copies that stand in for sgl_kernel's, and SGLang's seams once they are filled."""

from __future__ import annotations

import psutil
import torch
from sglang.srt.mem_cache.pool_host import base, common, mha, mla

from conserve_sgl.platform import hicache


def test_rows_are_copied_in_every_layer_and_others_stay() -> None:
    src = [torch.randn(10, 2, 4) for _ in range(3)]
    dst = [torch.zeros(20, 2, 4) for _ in range(3)]
    taken, put = torch.tensor([7, 0, 3]), torch.tensor([19, 2, 5], dtype=torch.int32)
    hicache.transfer_kv_direct(
        src_layers=src, dst_layers=dst, src_indices=taken, dst_indices=put, page_size=1
    )
    others = [row for row in range(20) if row not in put.tolist()]
    for layer in range(3):
        assert torch.equal(dst[layer][put.long()], src[layer][taken])
        assert not dst[layer][others].any()


def test_install_fills_the_seams_and_leaves_a_tenth_of_the_memory() -> None:
    hicache.install()
    hicache.install()
    allocate = common.ALLOC_MEMORY_FUNCS["cpu"]
    pool = allocate(
        (2, 3, 16),
        dtype=torch.bfloat16,
        device="cpu",
        pin_memory=True,
        allocator=common.HostTensorAllocator(),
        registration_granularity_bytes=None,
    )
    assert (pool.shape, pool.dtype) == ((2, 3, 16), torch.bfloat16)
    for pool_host in (mha, mla):
        assert pool_host.transfer_kv_direct is hicache.transfer_kv_direct
    assert psutil.virtual_memory().total // 10 >= base.HICACHE_HOST_MEMORY_RESERVE_BYTES
