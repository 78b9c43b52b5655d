"""Batches from creation to their end, by way of the official client."""

from __future__ import annotations

import json
import shutil
import threading
from typing import Any

import pytest

from batch.lines import CHAT, jsonl, request, requests
from conserve_sgl.batch.results import Results
from conserve_sgl.batch.server.store import Store
from conserve_sgl.errors import JobError, StorageError


def create(client, content: bytes, endpoint: str = CHAT, window: str = "24h", **options):
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window=window, **options
    )


def ended(server, client, batch, *statuses: str, step_s: float = 0.5):
    """The batch once it is over, which it must be in one of `statuses`."""

    def over():
        now = client.batches.retrieve(batch.id)
        return now if now.status in ("failed", "completed", "expired", "cancelled") else None

    batch = server.wait_until(over, step_s)
    assert batch.status in statuses, batch.errors
    return batch


def lines(client, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a result file by their custom_id."""
    if file_id is None:
        return {}
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found)
    return {line["custom_id"]: line for line in found}


def test_every_line_is_answered_once(server, client):
    batch = create(client, requests(50), metadata={"who": "me"})
    assert batch.status == "validating"
    assert batch.expires_at == batch.created_at + 86400

    batch = ended(server, client, batch, "completed")
    output = lines(client, batch.output_file_id)
    assert sorted(output) == sorted(f"r{i}" for i in range(50))
    assert set(server.engine.answered.values()) == {1}
    for i in range(50):
        line = output[f"r{i}"]
        assert line["id"].startswith("batch_req_")
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["request_id"]
        assert line["response"]["body"]["choices"][0]["message"]["content"] == f"WORD {i}"
    assert batch.error_file_id is None
    assert batch.errors is None
    assert batch.model == "m"
    assert batch.metadata == {"who": "me"}
    assert batch.request_counts.to_dict() == {"total": 50, "completed": 50, "failed": 0}
    assert batch.usage.total_tokens == 150
    assert batch.usage.input_tokens_details.cached_tokens == 50
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert (batch.failed_at, batch.expired_at, batch.cancelled_at) == (None, None, None)

    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.status) == ("batch_output", "processed")
    assert file.filename == f"{batch.id}_output.jsonl"
    assert file.bytes == len(client.files.content(file.id).read())


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "a"}),
        ("/v1/embeddings", {"model": "m", "input": "a"}),
        ("/v1/responses", {"model": "m", "input": "a"}),
    ],
)
def test_the_other_endpoints(server, client, endpoint, body):
    line = {"custom_id": "x", "method": "POST", "url": endpoint, "body": body}
    batch = ended(server, client, create(client, jsonl(line), endpoint), "completed")
    assert list(lines(client, batch.output_file_id)) == ["x"]
    assert batch.usage.input_tokens == 2
    ((path, _, sent),) = server.engine.requests
    assert (path, sent) == (endpoint, body)


def test_characters_that_end_a_line_for_some_readers_do_not_end_one_of_a_result(server, client):
    text = "a\u2028b\u2029c\x85d"
    batch = create(client, jsonl(request(text, text), request("wrong", "word 1")))
    server.engine.script = {"word 1": [(400, {})]}
    batch = ended(server, client, batch, "completed")
    (line,) = client.files.content(batch.output_file_id).iter_lines()
    assert json.loads(line)["custom_id"] == text
    answer = json.loads(line)["response"]["body"]["choices"][0]["message"]["content"]
    assert answer == text.upper()


def test_every_request_is_offline_and_names_its_job(server, client):
    batch = create(client, requests(3), window="1h")
    ended(server, client, batch, "completed")
    for _, headers, _ in server.engine.requests:
        assert headers["x-sgl-conserve-class"] == "offline"
        assert headers["x-sgl-conserve-job"] == batch.id
        assert 3000 < float(headers["x-sgl-conserve-deadline-s"]) <= 3600


def test_the_servers_own_key_opens_its_routes(start_server, connect):
    server = start_server(api_key="secret")
    client = connect(server, api_key="secret")
    batch = ended(server, client, create(client, requests(3)), "completed")
    assert batch.request_counts.completed == 3


def test_http_failures_go_to_the_error_file(server, client):
    server.engine.script = {"word 1": [(400, {})], "word 2": ["text"]}
    batch = ended(server, client, create(client, requests(4)), "completed")
    assert sorted(lines(client, batch.output_file_id)) == ["r0", "r3"]
    errors = lines(client, batch.error_file_id)
    assert errors["r1"]["response"]["status_code"] == 400
    assert errors["r1"]["response"]["body"] == {"error": {"message": "scripted"}}
    assert errors["r1"]["error"] is None
    assert errors["r2"]["response"]["status_code"] == 418
    assert errors["r2"]["response"]["body"] == {"error": {"message": "not JSON"}}
    assert batch.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
    assert client.files.retrieve(batch.error_file_id).filename == f"{batch.id}_error.jsonl"


def test_a_batch_whose_every_line_failed_is_completed(server, client):
    server.engine.always = (400, {})
    batch = ended(server, client, create(client, requests(3)), "completed")
    assert batch.output_file_id is None
    assert len(lines(client, batch.error_file_id)) == 3


def test_a_busy_server_is_waited_for(server, client):
    busy = [(429, {"retry-after": "7"}), (503, {})] * 4
    server.engine.script = {"word 1": busy}
    batch = ended(server, client, create(client, requests(3)), "completed")
    assert batch.request_counts.completed == 3
    assert server.engine.order.count("word 1") == 9


FAILED = '{"object": "response", "status": "failed", "error": {"message": "Generation aborted"}}'


@pytest.mark.parametrize("fault", [(500, {}), (502, {}), (408, {}), "raise", "abort", FAILED])
def test_a_passing_fault_is_tried_again(server, client, fault):
    server.engine.script = {"word 1": [fault, fault]}
    batch = ended(server, client, create(client, requests(3)), "completed")
    assert batch.request_counts.completed == 3


def test_a_lasting_fault_is_the_result(server, client):
    server.engine.script = {
        "word 0": [(500, {})] * 3,
        "word 1": ["abort"] * 3,
        "word 2": [FAILED] * 3,
    }
    batch = ended(server, client, create(client, requests(4)), "completed")
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 3)
    errors = lines(client, batch.error_file_id)
    assert errors["r0"]["response"]["status_code"] == 500
    assert errors["r1"]["response"] is None
    assert errors["r1"]["error"]["code"] == errors["r2"]["error"]["code"] == "aborted"
    assert "Generation aborted (tried 3 times)" in errors["r2"]["error"]["message"]


def test_a_file_with_faults_fails_with_their_lines(server, client):
    batch = create(client, jsonl(request("a"), b"{nope\n", request("a"), request("b", url="/x")))
    batch = ended(server, client, batch, "failed")
    assert [(e.line, e.code) for e in batch.errors.data] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "invalid_url"),
    ]
    assert batch.failed_at >= batch.created_at
    assert batch.in_progress_at is None
    assert batch.request_counts.total == 0
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert server.engine.requests == []


def test_a_file_that_is_gone_from_the_disk_fails_its_batch(server, client):
    file = client.files.create(file=("in.jsonl", requests(3)), purpose="batch")
    path = next(iter((server.batches._storage.files).iterdir()))
    path.unlink()
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    batch = ended(server, client, batch, "failed")
    assert [e.code for e in batch.errors.data] == ["unreadable_file"]


def test_a_cancelled_batch_keeps_what_was_done(server, client):
    server.engine.script = {"word 0": [(429, {"retry-after": "999999"})]}
    batch = create(client, requests(5))
    server.wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 4)
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert cancelling.request_counts.completed == 4
    batch = ended(server, client, batch, "cancelled")
    assert batch.cancelling_at <= batch.cancelled_at
    assert len(lines(client, batch.output_file_id)) == 4
    assert batch.error_file_id is None
    assert batch.request_counts.to_dict() == {"total": 5, "completed": 4, "failed": 0}
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_cancelling_lets_what_is_in_flight_finish(server, client):
    server.engine.gate.clear()
    batch = create(client, requests(3))
    server.wait_until(lambda: server.engine.active == 3)
    client.batches.cancel(batch.id)
    server.engine.gate.set()
    batch = ended(server, client, batch, "cancelled", step_s=0)
    assert batch.request_counts.completed == 3


def test_cancelling_gives_up_what_takes_too_long(server, client):
    server.engine.gate.clear()
    batch = create(client, requests(3))
    server.wait_until(lambda: server.engine.active == 3)
    client.batches.cancel(batch.id)
    batch = ended(server, client, batch, "cancelled")
    assert server.engine.gone == 3
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 0, "failed": 0}
    assert (batch.output_file_id, batch.error_file_id) == (None, None)


def test_what_is_not_done_in_time_expires(start_server, connect):
    server = start_server(max_in_flight=2)
    client = connect(server)
    batch = create(client, requests(6), window="1h")
    server.wait_until(lambda: len(server.engine.answered) == 6)
    server.engine.gate.clear()
    batch = create(client, requests(6), window="1h")
    server.wait_until(lambda: server.engine.active == 2)
    server.clock.now_s += 3600
    batch = ended(server, client, batch, "expired")
    errors = lines(client, batch.error_file_id)
    assert len(errors) == 6
    for line in errors.values():
        assert line["response"] is None
        assert line["error"]["code"] == "batch_expired"
    assert batch.output_file_id is None
    assert batch.request_counts.to_dict() == {"total": 6, "completed": 0, "failed": 6}
    assert batch.expires_at <= batch.expired_at
    assert batch.completed_at is None
    assert server.engine.gone == 2


def test_no_more_is_in_flight_than_the_server_is_told(start_server, connect):
    server = start_server(max_in_flight=3)
    client = connect(server)
    server.engine.gate.clear()
    first, second = create(client, requests(10)), create(client, requests(10))
    server.wait_until(lambda: server.engine.active == 3)
    server.engine.gate.set()
    for batch in (first, second):
        ended(server, client, batch, "completed")
    assert server.engine.peak == 3


def test_a_small_batch_does_not_wait_for_a_large_one(start_server, connect):
    server = start_server(max_in_flight=4)
    client = connect(server)
    server.engine.gate.clear()
    large = create(client, jsonl(*(request(f"l{i}", f"large {i}") for i in range(100))))
    server.wait_until(lambda: server.engine.active == 4)
    small = create(client, jsonl(*(request(f"s{i}", f"small {i}") for i in range(5))))
    server.wait_until(lambda: client.batches.retrieve(small.id).status == "in_progress")
    server.wait_until(lambda: client.batches.retrieve(small.id).request_counts.total == 5)
    server.engine.gate.set()
    ended(server, client, small, "completed")
    ended(server, client, large, "completed")
    last_small = max(i for i, text in enumerate(server.engine.order) if "small" in text)
    assert last_small < 30


def test_lines_that_share_a_prefix_are_sent_together(start_server, connect):
    server = start_server(max_in_flight=1)
    client = connect(server)
    kinds = {"a": "a" * 500, "b": "b" * 500}
    content = jsonl(*(request(f"{k}{i}", f"{t} {i}") for i in range(5) for k, t in kinds.items()))
    ended(server, client, create(client, content), "completed")
    order = "".join(text[0] for text in server.engine.order)
    assert order in ("aaaaabbbbb", "bbbbbaaaaa")


def test_counts_are_live(server, client):
    server.engine.script = {"word 3": [(429, {"retry-after": "999999"})]}
    batch = create(client, requests(5))

    def four_are_done():
        now = client.batches.retrieve(batch.id)
        return now.request_counts.completed == 4 and now

    now = server.wait_until(four_are_done)
    assert (now.status, now.request_counts.total, now.usage.total_tokens) == ("in_progress", 5, 12)
    assert client.batches.list().data[0].request_counts.completed == 4


def test_results_wait_for_a_full_disk(server, client, monkeypatch):
    full = threading.Event()
    full.set()
    add = Results.add

    def add_if_there_is_room(self, line) -> None:
        if full.is_set():
            raise JobError("no space left")
        add(self, line)

    monkeypatch.setattr(Results, "add", add_if_there_is_room)
    batch = create(client, requests(5))
    server.wait_until(lambda: len(server.engine.answered) == 5)
    server.clock.now_s += 60
    assert client.batches.retrieve(batch.id).request_counts.completed == 0
    full.clear()
    batch = ended(server, client, batch, "completed")
    assert batch.request_counts.completed == 5
    assert set(server.engine.answered.values()) == {1}


def test_states_wait_for_a_full_disk(server, client, monkeypatch):
    file = client.files.create(file=("in.jsonl", requests(3)), purpose="batch")
    faults = [StorageError("database or disk is full")] * 3
    update = Store.update_batch

    async def update_if_there_is_room(self, record) -> None:
        if faults:
            raise faults.pop()
        await update(self, record)

    monkeypatch.setattr(Store, "update_batch", update_if_there_is_room)
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert ended(server, client, batch, "completed").request_counts.completed == 3
    assert faults == []


def test_a_fault_of_ours_fails_the_batch_and_keeps_what_was_done(server, client, monkeypatch):
    batch_of = Results.add

    def add(self, line) -> None:
        if line.custom_id == "r2":
            raise ZeroDivisionError
        batch_of(self, line)

    monkeypatch.setattr(Results, "add", add)
    batch = ended(server, client, create(client, requests(4)), "failed")
    assert batch.errors.data[0].code == "internal_error"
    assert len(lines(client, batch.output_file_id)) == batch.request_counts.completed > 0


def test_fields_that_are_null_are_not_sent(server, client):
    """To OpenAI they say nothing; SGLang refuses most of them."""
    body = {"stream": None, "n": None, "stop": ["null"], "metadata": {"a": None}, "seed": 3}
    ended(server, client, create(client, requests(1, body=body)), "completed")
    ((_, _, sent),) = server.engine.requests
    messages = [{"role": "user", "content": "word 0"}]
    kept = {"stop": ["null"], "metadata": {"a": None}, "seed": 3}
    assert sent == {"model": "m", "messages": messages} | kept


# ------------------------------------------------------------------ restarts


def test_the_counts_do_not_fall_over_a_restart(start_server, connect, tmp_path):
    server = start_server(max_in_flight=4)
    client = connect(server)
    server.engine.script = {"word 3": [(429, {"retry-after": "999999"})], "word 5": [(400, {})]}
    batch = create(client, requests(10))

    def counts() -> Any:
        return client.batches.retrieve(batch.id).request_counts

    server.wait_until(lambda: (counts().completed, counts().failed) == (8, 1), step_s=0.0)
    before = counts()
    # As a death leaves it: the counts in the store are those of some time before.
    folder = shutil.copytree(tmp_path / "storage", tmp_path / "copy")

    again = start_server(folder=folder, start="held")
    client = connect(again)
    assert client.batches.retrieve(batch.id).request_counts == before
    again.hold(False)
    batch = ended(again, client, batch, "completed")
    assert batch.request_counts.to_dict() == {"total": 10, "completed": 9, "failed": 1}


def test_a_restart_goes_on_and_repeats_nothing(start_server, connect):
    server = start_server(max_in_flight=4)
    client = connect(server)
    stuck = {f"word {i}": [(429, {"retry-after": "999999"})] for i in (3, 7)}
    server.engine.script = stuck
    batch = create(client, requests(10))
    server.wait_until(lambda: len(server.engine.answered) == 8)
    server.stop()
    assert server.engine.stopped == 1

    again = start_server()
    client = connect(again)
    batch = ended(again, client, batch, "completed")
    assert sorted(again.engine.answered) == ["word 3", "word 7"]
    assert len(lines(client, batch.output_file_id)) == 10
    assert batch.usage.total_tokens == 30


def test_a_server_that_stops_sends_nothing_more(start_server, connect):
    server = start_server(max_in_flight=2)
    client = connect(server)
    server.engine.gate.clear()
    batch = create(client, requests(6))
    server.wait_until(lambda: server.engine.active == 2)
    server.draining.set()
    server.wait_until(lambda: server.engine.gone == 2)
    assert len(server.engine.requests) == 2
    assert client.batches.retrieve(batch.id).status == "in_progress"
    server.stop()

    again = start_server()
    ended(again, connect(again), batch, "completed")
    assert len(again.engine.answered) == 6


def test_a_deadline_that_passed_while_the_server_was_down(start_server, connect):
    server = start_server()
    client = connect(server)
    server.engine.script = {"word 1": [(429, {"retry-after": "999999"})]}
    batch = create(client, requests(3), window="1h")
    server.wait_until(lambda: len(server.engine.answered) == 2)
    server.stop()

    server.clock.now_s += 7200
    again = start_server(clock=server.clock)
    client = connect(again)
    batch = ended(again, client, batch, "expired")
    assert list(lines(client, batch.error_file_id)) == ["r1"]
    assert sorted(lines(client, batch.output_file_id)) == ["r0", "r2"]
    assert again.engine.requests == []


def test_a_batch_that_was_being_cancelled_is_cancelled(start_server, connect):
    server = start_server()
    client = connect(server)
    server.engine.gate.clear()
    batch = create(client, requests(3))
    server.wait_until(lambda: server.engine.active == 3)
    client.batches.cancel(batch.id)
    server.stop()

    again = start_server()
    ended(again, connect(again), batch, "cancelled")
    assert again.engine.requests == []
