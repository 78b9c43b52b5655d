"""A token follows from the request and the position, however the steps were cut."""

from __future__ import annotations

import pytest
import torch

from conserve_sgl.platform.emulated.tokens import checksums, next_tokens

PROMPT = torch.randint(0, 100_000, (1, 57), generator=torch.Generator().manual_seed(1))[0]


def sums_of(tokens: torch.Tensor, start: int = 0, before: int = 0) -> torch.Tensor:
    """Of one request's tokens, from position `start` on."""
    positions = torch.arange(start, start + len(tokens))
    return checksums(tokens, positions, torch.tensor([len(tokens)]), torch.tensor([before]))


@pytest.mark.parametrize("cut", [1, 20, 56])
def test_chunks_go_on_from_the_checksum_before_them(cut: int) -> None:
    whole = sums_of(PROMPT)
    rest = sums_of(PROMPT[cut:], cut, int(whole[cut - 1]))

    assert torch.equal(rest, whole[cut:])


def test_requests_of_one_step_do_not_touch_each_other() -> None:
    parts, starts = [PROMPT[:3], PROMPT[10:11], PROMPT[20:50]], [0, 10, 20]
    before = torch.tensor([0, 77, -5])
    together = checksums(
        torch.cat(parts),
        torch.cat([torch.arange(s, s + len(p)) for p, s in zip(parts, starts, strict=True)]),
        torch.tensor([len(part) for part in parts]),
        before,
    )
    alone = [sums_of(p, s, int(b)) for p, s, b in zip(parts, starts, before.tolist(), strict=True)]

    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    "other",
    [
        torch.cat([PROMPT[1:], PROMPT[:1]]),  # another order
        torch.cat([PROMPT, PROMPT[-1:]]),  # a token repeated
        PROMPT[:-1],  # a token lost
        torch.cat([PROMPT[:5], PROMPT[5:6] ^ 1, PROMPT[6:]]),
    ],
)
def test_any_change_of_the_tokens_shows(other: torch.Tensor) -> None:
    assert int(sums_of(other)[-1]) != int(sums_of(PROMPT)[-1])


def test_next_tokens_are_of_the_vocabulary_and_spread_over_it() -> None:
    vocabulary = torch.arange(5, 205)
    counts = torch.bincount(next_tokens(sums_of(torch.arange(20_000)), vocabulary), minlength=205)

    assert counts[:5].sum() == 0
    assert counts[5:].min() > 50  # 100 are expected; fewer than 50 has a chance of 1e-7 each
