"""What the simulated engine is given: the bench's arrivals and backlog, without the token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from conserve_sgl.bench.load.arrivals import Arrival
from conserve_sgl.bench.load.backlog import RandomPrompts
from conserve_sgl.simulate.request import Request

__all__ = ["backlog_requests", "online_requests"]


def online_requests(arrivals: Sequence[Arrival]) -> list[Request]:
    """One request for each arrival."""
    return [
        Request(
            online=True,
            due_s=arrival.at_s,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=arrival.output_tokens,
            blocks=arrival.blocks,
            block_tokens=arrival.block_tokens,
        )
        for arrival in arrivals
    ]


def backlog_requests(source: RandomPrompts, seed: Sequence[int]) -> Iterator[Request]:
    """The requests of `source.bodies(seed)`, in their order, without end."""
    for shape in source.shapes(seed):
        yield Request(
            online=False,
            due_s=0.0,
            prompt_tokens=source.prefix_tokens + shape.prompt_tokens,
            output_tokens=shape.output_tokens,
            blocks=(("prefix", shape.group),) if source.prefix_tokens else (),
            block_tokens=source.prefix_tokens,
        )
