"""The KV pool: tokens that requests hold for themselves, and blocks that they share.

Blocks stay when nobody holds them, until their room is needed, the longest unused first: SGLang's
radix cache, as far as whole blocks go. A finished request's own tokens are not kept, since nobody
else asks for them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from conserve_sgl.simulate.request import Request

__all__ = ["KvPool"]


class KvPool:
    """A pool of `total_tokens`."""

    def __init__(self, total_tokens: int) -> None:
        self.total_tokens = total_tokens
        self._own = 0
        self._held = 0
        self._idle = 0
        self._blocks: dict[Hashable, list[int]] = {}  # tokens and holders; used last stands last

    @property
    def free_tokens(self) -> int:
        """Tokens that nobody holds; unused blocks count as free."""
        return self.total_tokens - self._own - self._held

    def match(self, request: Request) -> int:
        """Prompt tokens of `request` that are in blocks here; less than its prompt."""
        found = 0
        for key in request.blocks:
            if key not in self._blocks:
                break
            found += request.block_tokens
        return min(found, request.prompt_tokens - 1)

    def admit(self, request: Request) -> int:
        """Let `request` hold the blocks that it finds; the tokens in them."""
        found = self.match(request)
        for key in _whole(request, found):
            self._take(key)
        request.shared = request.resident = len(_whole(request, found)) * request.block_tokens
        return request.resident

    def grow(self, request: Request, tokens: int) -> None:
        """`tokens` of `request` more have KV; those that fill a block are shared from here on."""
        request.resident += tokens
        self._own += tokens
        whole = _whole(request, request.resident)
        for key in whole[request.shared // request.block_tokens if request.block_tokens else 0 :]:
            self._own -= request.block_tokens
            request.shared += request.block_tokens
            if key in self._blocks:
                self._take(key)
            else:
                self._blocks[key] = [request.block_tokens, 1]
                self._held += request.block_tokens
        self._evict()

    def grow_rows(self, rows: Sequence[Request]) -> None:
        """A token more of each of `rows` has KV; their prompts have, so that no block fills."""
        for row in rows:
            row.resident += 1
        self._own += len(rows)
        self._evict()

    def release(self, request: Request) -> None:
        """`request` holds nothing any more."""
        self._own -= request.resident - request.shared
        for key in _whole(request, request.shared):
            block = self._blocks[key]
            block[1] -= 1
            if not block[1]:
                self._held -= block[0]
                self._idle += block[0]
        request.resident = request.shared = 0
        self._evict()

    def _take(self, key: Hashable) -> None:
        block = self._blocks.pop(key)
        if not block[1]:
            self._held += block[0]
            self._idle -= block[0]
        block[1] += 1
        self._blocks[key] = block

    def _evict(self) -> None:
        over = self._idle - self.free_tokens
        if over <= 0:
            return
        for key in [key for key, block in self._blocks.items() if not block[1]]:
            tokens, _ = self._blocks.pop(key)
            self._idle -= tokens
            over -= tokens
            if over <= 0:
                return


def _whole(request: Request, tokens: int) -> Sequence[Hashable]:
    """The blocks of `request` that lie within its first `tokens`, and within its prompt."""
    if not request.block_tokens:
        return ()
    return request.blocks[: min(tokens, request.prompt_tokens) // request.block_tokens]
