"""One batch over many servers, straight to the workers of a gateway."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from batch.lines import jsonl, request
from conserve_sgl.batch.run_batch import RunBatch, run_batch
from conserve_sgl.client import http as client_http
from conserve_sgl.client.retry import Retry
from conserve_sgl.errors import InputError
from fleet.worker import Worker

pytestmark = pytest.mark.timeout(120)


def lines_of(folder: Path, texts: list[str]) -> Path:
    path = folder / "in.jsonl"
    path.write_bytes(jsonl(*(request(str(i), text) for i, text in enumerate(texts))))
    return path


def job(folder: Path, texts: list[str], **options) -> RunBatch:
    return RunBatch(
        input=str(lines_of(folder, texts)),
        output=str(folder / "out.jsonl"),
        errors=str(folder / "errors.jsonl"),
        retry=Retry(first_delay_s=0.05, max_delay_s=0.2),
        **{"endpoints": [], "max_in_flight": 32, **options},
    )


def run(batch: RunBatch) -> tuple[int, str]:
    console = Console(file=io.StringIO())
    return run_batch(batch, console=console), console.file.getvalue()


def answers(batch: RunBatch) -> dict[str, str]:
    """The answer of every line, each there once."""
    found = {}
    for line in Path(batch.output).read_text().splitlines():
        record = json.loads(line)
        assert record["custom_id"] not in found
        body = record["response"]["body"]
        found[record["custom_id"]] = body["choices"][0]["message"]["content"]
    return found


def served(workers: list[Worker]) -> Counter[str]:
    return sum((w.offline for w in workers), Counter())


TEXTS = [f"line {i}" for i in range(300)]
ALL = {str(i): f"LINE {i}" for i in range(300)}


def test_it_goes_straight_to_the_workers_of_a_gateway(start_worker, start_gateway, tmp_path):
    workers = [start_worker() for _ in range(3)]
    gateway = start_gateway(workers)
    batch = job(tmp_path, TEXTS, discover=gateway.url)
    assert run(batch)[0] == 0
    assert answers(batch) == ALL
    assert served(workers) == dict.fromkeys(TEXTS, 1)
    assert min(w.offline.total() for w in workers) > 50
    # The gateway would have dropped it.
    assert all(h["x-sgl-conserve-class"] == "offline" for w in workers for h in w.headers)


def test_a_worker_that_dies_is_replaced_and_no_line_is_lost(
    start_worker, start_gateway, tmp_path, monkeypatch
):
    monkeypatch.setattr(client_http, "REDISCOVER_S", 0.2)
    workers = [start_worker(row_s=0.03) for _ in range(2)]
    gateway = start_gateway(workers, "--health-failure-threshold", "1")
    batch = job(tmp_path, TEXTS, discover=gateway.url)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(run(batch)[0]))
    thread.start()
    while workers[0].offline.total() < 20:
        time.sleep(0.005)
    workers[0].stop()
    third = start_worker(row_s=0.03)
    gateway.add(third.url)
    thread.join()
    assert results == [0]
    assert answers(batch) == ALL
    assert third.offline.total() > 0
    assert set(served([*workers, third])) == set(TEXTS)


def test_a_slow_worker_gets_less(start_worker, tmp_path):
    fast, slow = start_worker(row_s=0.01), start_worker(row_s=0.1)
    batch = job(tmp_path, TEXTS, endpoints=[fast.url, slow.url])
    assert run(batch)[0] == 0
    assert answers(batch) == ALL
    assert fast.offline.total() > 2 * slow.offline.total()


def test_a_server_that_takes_only_what_it_has_room_for_is_never_overrun(start_worker, tmp_path):
    workers = [start_worker(take_spare_only=True, row_s=0.01) for _ in range(2)]
    batch = job(tmp_path, TEXTS, endpoints=[w.url for w in workers], max_in_flight=64)
    assert run(batch)[0] == 0
    assert answers(batch) == ALL
    assert max(w.peak for w in workers) <= 8


def test_a_stock_server_beside_one_with_conserve_does_its_share(start_worker, tmp_path):
    ours, stock = start_worker(), start_worker(conserve=False)
    batch = job(tmp_path, TEXTS, endpoints=[ours.url, stock.url])
    assert run(batch)[0] == 0
    assert answers(batch) == ALL
    assert ours.offline.total() + stock.online.total() == 300
    assert min(ours.offline.total(), stock.online.total()) > 0


def test_lines_that_begin_alike_go_to_one_worker_as_far_as_balance_allows(start_worker, tmp_path):
    workers = [start_worker(rows=64) for _ in range(3)]
    texts = [f"{'abcdef'[i % 6] * 300} {i}" for i in range(300)]
    batch = job(tmp_path, texts, endpoints=[w.url for w in workers], max_in_flight=6)
    assert run(batch)[0] == 0
    at = [Counter(text[0] for text in w.offline.elements()) for w in workers]
    at_home = sum(max(counter[letter] for counter in at) for letter in "abcdef")
    assert at_home > 0.6 * 300  # a third, where nobody cared


def test_endpoints_and_a_gateway_at_once_are_one_too_many(tmp_path):
    batch = job(tmp_path, TEXTS, endpoints=["http://a"], discover="http://b")
    with pytest.raises(InputError, match="--discover: finds the endpoints"):
        run(batch)


def test_a_gateway_that_is_no_url_is_named(tmp_path):
    with pytest.raises(InputError, match="--discover: 'gateway:3' is not a base URL"):
        run(job(tmp_path, TEXTS, discover="gateway:3"))


def test_a_server_that_says_what_it_takes_is_filled_before_its_first_answer(start_worker, tmp_path):
    workers = [start_worker(rows=40, row_s=1.0) for _ in range(2)]
    batch = job(tmp_path, TEXTS[:60], endpoints=[w.url for w in workers], max_in_flight=60)
    assert run(batch)[0] == 0
    assert min(w.peak for w in workers) > 8
