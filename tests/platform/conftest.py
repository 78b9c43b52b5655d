"""SGLang warns about absent GPU kernels while it is imported; after this it is imported."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sglang.srt.layers.attention.attention_registry
    import sglang.srt.layers.attention.torch_native_backend
    import sglang.srt.mem_cache.pool_host.mha  # noqa: F401
