from __future__ import annotations

import msgspec

from conserve_sgl.bench.load.arrivals import Arrival
from conserve_sgl.bench.load.prompts import TokenIds, timed_requests

ARRIVALS = [Arrival(0.5 * i, 20 + i, 5 + i) for i in range(50)]
IDS = TokenIds(low=100, high=5000)


def bodies(seed: list[int]) -> list[dict]:
    return [msgspec.json.decode(request.body) for request in timed_requests(ARRIVALS, IDS, seed)]


def test_lengths_are_exactly_those_of_the_arrivals() -> None:
    for arrival, body in zip(ARRIVALS, bodies([1, 1]), strict=True):
        assert len(body["input_ids"]) == arrival.prompt_tokens
        assert body["sampling_params"]["max_new_tokens"] == arrival.output_tokens
        assert body["sampling_params"]["ignore_eos"] is True
        assert body["stream"] is True


def test_ids_stay_in_the_range() -> None:
    ids = [token for body in bodies([1, 1]) for token in body["input_ids"]]

    assert min(ids) >= 100
    assert max(ids) < 5000


def test_no_two_prompts_share_a_beginning_within_a_stream_or_across_seeds() -> None:
    beginnings = [tuple(body["input_ids"][:4]) for seed in (1, 2) for body in bodies([9, seed])]

    assert len(set(beginnings)) == len(beginnings)


def test_the_same_seed_gives_the_same_bodies() -> None:
    assert bodies([3, 1]) == bodies([3, 1])


def test_prompts_with_the_same_blocks_begin_alike_and_no_further() -> None:
    shared = [Arrival(0.0, 25, 5, blocks=(7, 8), block_tokens=10) for _ in range(2)]
    other = Arrival(0.0, 15, 5, blocks=(7, 9), block_tokens=10)

    bodies = [msgspec.json.decode(r.body) for r in timed_requests([*shared, other], IDS, 3)]

    one, two, three = (body["input_ids"] for body in bodies)
    assert (len(one), len(two), len(three)) == (25, 25, 15)
    assert one[:20] == two[:20]
    assert one[20:] != two[20:]
    assert three[:10] == one[:10]
    assert three[10:] != one[10:15]


def test_extra_fields_go_into_every_body() -> None:
    for request in timed_requests(ARRIVALS, IDS, 1, {"priority": -100}):
        assert msgspec.json.decode(request.body)["priority"] == -100
