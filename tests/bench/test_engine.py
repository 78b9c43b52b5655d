"""The benchmark on real engines, and SGLang's own benchmark beside ours."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.load.streams import replay
from conserve_sgl.bench.report.metrics import Slo, summarize
from conserve_sgl.bench.report.results import by_system, read_folder
from support.server import TINY_FLAGS, Server

pytestmark = pytest.mark.engine

N, OUTPUT_TOKENS = 12, 8


@pytest.mark.usefixtures("no_other_server")
def test_a_cut_of_the_quick_file_measures_conserve_beside_stock(
    checkout: Path, shared_data: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    quick = yaml.safe_load((checkout / "configs" / "bench" / "cpu-quick.yaml").read_text())
    ids = {"low": 10, "high": 250}  # the tiny model's vocabulary
    quick["online"]["token_ids"] = quick["offline"]["backlog"]["token_ids"] = ids
    quick["online"]["arrivals"]["stretch"] = 4  # a faster model, a shorter stream
    path, out = tmp_path / "quick.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(quick))
    options = {
        "--model": tiny_llama,
        "--trace": shared_data / "azure_llm_2023_conv.csv",
        "--systems": "online-only,conserve",
        "--duration": 6,
        "--out": out,
    }
    flat = [str(word) for option in options.items() for word in option]

    done = subprocess.run(
        [sys.executable, "-m", "conserve_sgl.cli", "bench", str(path), *flat, "--", *TINY_FLAGS],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    base, ours = by_system(read_folder(out))
    assert (base.name, ours.name) == ("online-only", "conserve")
    assert base.online.completed == base.online.sent == ours.online.completed > 3
    assert base.online.output_tokens == ours.online.output_tokens
    assert base.offline is None
    assert ours.offline.output_tokens > 0
    assert ours.counters["offline_accepted"] > 0
    assert 0 < base.idle_share <= 1
    assert ours.idle_share < base.idle_share
    assert {"table.md", "over_time.png", "tradeoff.png"} <= {p.name for p in out.iterdir()}


@pytest.fixture(scope="module")
def theirs(plain_server: Server, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    """The result line of SGLang's own benchmark, with every request's timings in it."""
    path = tmp_path_factory.mktemp("sglang") / "result.jsonl"
    argv = [sys.executable, "-m", "sglang.benchmark.serving", "--backend=sglang"]
    argv += [
        f"--base-url={plain_server.base_url}",
        f"--model={tiny_llama}",
        "--dataset-name=random-ids",
    ]
    argv += [f"--num-prompts={N}", "--random-input-len=20", f"--random-output-len={OUTPUT_TOKENS}"]
    argv += ["--random-range-ratio=1.0", "--request-rate=8", "--output-details", "--disable-tqdm"]
    argv += ["--warmup-requests=1", "--seed=1", f"--output-file={path}", "--tokenize-prompt"]
    argv += ["--goodput", "ttft:60000", "tpot:60000"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = path.read_text().splitlines()
    return json.loads(line)


def test_their_timings_in_our_definitions_give_their_figures(theirs: dict) -> None:
    """Every latency key that both write, from the same requests: definitions agree exactly."""
    records = [
        _record(*timings)
        for timings in zip(
            theirs["input_lens"],
            theirs["ttfts"],
            theirs["itls"],
            theirs["output_lens"],
            strict=True,
        )
    ]

    ours = summarize(records, theirs["duration"], Slo(ttft_ms=60_000, tpot_ms=60_000)).sglang_keys()

    for key in ("completed", "total_input_tokens", "total_output_tokens", "request_throughput"):
        assert ours[key] == pytest.approx(theirs[key]), key
    for metric in ("ttft", "itl"):
        for statistic in ("mean", "median", "std", "p90", "p95", "p99"):
            key = f"{statistic}_{metric}_ms"
            assert ours[key] == pytest.approx(theirs[key]), key
    # Theirs ends a request when the stream closes, ours with its last token.
    for key in ("mean_tpot_ms", "median_tpot_ms", "mean_e2e_latency_ms"):
        assert ours[key] <= theirs[key] * 1.000001
    assert set(ours) - set(theirs) == {"max_itl_ms"}  # which they only print


def _record(
    prompt_tokens: int, ttft_s: float, itls_s: list[float], output_tokens: int
) -> RequestRecord:
    times_s = np.cumsum([ttft_s, *itls_s]).tolist()
    return RequestRecord(
        class_="online",
        due_s=0.0,
        sent_s=0.0,
        done_s=times_s[-1],
        chunk_times_s=tuple(times_s),
        # Now and then the first chunk brings two tokens; they have no gap for the first ones.
        chunk_tokens=(output_tokens - len(itls_s), *(1 for _ in itls_s)),
        prompt_tokens=prompt_tokens,
        cached_tokens=0,
        error=None,
    )


def test_the_same_load_through_both_counts_the_same(plain_server: Server, theirs: dict) -> None:
    from conserve_sgl.bench.load.arrivals import Arrival
    from conserve_sgl.bench.load.prompts import TokenIds, timed_requests

    arrivals = [Arrival(i / 8, n, OUTPUT_TOKENS) for i, n in enumerate(theirs["input_lens"])]
    requests = timed_requests(arrivals, TokenIds(10, 250), 5)

    result = asyncio.run(replay(plain_server.base_url, requests, drain_s=60))

    ours = summarize(result.records, result.duration_s, Slo(60_000, 60_000)).sglang_keys()
    for key in ("completed", "total_input_tokens", "total_output_tokens"):
        assert ours[key] == theirs[key], key
    for key in ("median_ttft_ms", "median_tpot_ms", "median_e2e_latency_ms"):
        print(f"{key}: ours {ours[key]:.2f}, theirs {theirs[key]:.2f}")
