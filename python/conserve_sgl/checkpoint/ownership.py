"""Checks who owns the KV of requests: the intervals drawn in `checkpointer.py`. For tests.

With `CONSERVE_TEST_OWNERSHIP=1` the scheduler checks its offline requests after every step; what
is wrong ends it, so that a test which meets it fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from conserve_sgl.checkpoint.host import Req, UnifiedRadixCache

__all__ = ["OWNERSHIP_ENV", "check_ownership", "is_asked_for"]

OWNERSHIP_ENV = "CONSERVE_TEST_OWNERSHIP"


def is_asked_for() -> bool:
    """Whether this process is to check."""
    return os.environ.get(OWNERSHIP_ENV) == "1"


def check_ownership(reqs: Iterable[Req], tree: UnifiedRadixCache) -> None:
    """Check that every slot of `reqs` has one owner.

    Args:
        reqs: offline requests, with a row or without.
        tree: the cache that they share.

    Raises:
        AssertionError: naming the request.
    """
    owner: dict[int, str] = {}
    for req in reqs:
        _check_intervals(req, tree.page_size)
        if not req.kv.holds_kv:
            continue
        row = tree.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        shared = row[: req.kv.cache_protected_len].tolist()
        in_tree = tree.path_device_indices(req.last_node).tolist()
        assert shared == in_tree, f"{req.rid}: its row and the tree differ on what is shared"
        own = row[req.kv.cache_protected_len : req.kv.kv_allocated_len].tolist()
        for slot in own:
            assert slot not in owner, f"{req.rid} and {owner[slot]} both own slot {slot}"
            owner[slot] = req.rid


def _check_intervals(req: Req, page: int) -> None:
    kv = req.kv
    if not kv.holds_kv:
        assert kv.kv_allocated_len == 0, f"{req.rid} holds KV without a row: {kv}"
        return
    assert 0 <= kv.cache_protected_len <= kv.kv_committed_len <= kv.kv_allocated_len, (
        f"{req.rid}: intervals overlap: {kv}"
    )
    assert kv.cache_protected_len % page == 0, f"{req.rid}: half a page is shared: {kv}"
    assert req.lock is not None, f"{req.rid} does not lock what it shares"
