"""What the scheduler reads of SGLang's KV pools."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang warns about absent GPU kernels while it is imported
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    from conserve_sgl.engine.device import kv_token_bytes

LAYERS = 3
POOL = {
    "size": 32,
    "page_size": 1,
    "dtype": torch.float32,
    "layer_num": LAYERS,
    "device": "cpu",
    "enable_memory_saver": False,
}


@pytest.mark.parametrize(
    ("pool_class", "shape", "numbers"),
    [
        (MHATokenToKVPool, {"head_num": 2, "head_dim": 8}, 2 * 2 * 8),
        (MLATokenToKVPool, {"kv_lora_rank": 16, "qk_rope_head_dim": 8}, 16 + 8),
    ],
)
def test_the_bytes_of_a_token(pool_class, shape, numbers):
    """Of keys and values, or of the latents that stand for both."""
    assert kv_token_bytes(pool_class(**POOL, **shape)) == LAYERS * numbers * 4
