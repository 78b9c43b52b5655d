"""The routes, as the official client and as others meet them."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from batch.fake_engine import FakeServer
from batch.lines import CHAT, jsonl, request, requests
from conserve_sgl.batch.server.upload import UploadTooLarge, receive_upload
from conserve_sgl.config import BatchConfig
from conserve_sgl.status.record import BatchLine

JSONL = requests(3)


@pytest.fixture
def http_client(server):
    with httpx.Client(base_url=f"{server.url}/v1") as http_client:
        yield http_client


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[FakeServer]:
    """For what is refused: the server is the same afterwards."""
    server = FakeServer(BatchConfig(storage_dir=str(tmp_path_factory.mktemp("shared"))))
    yield server
    server.stop()


@pytest.fixture
def refusing(shared):
    before = stored(shared)
    with httpx.Client(base_url=f"{shared.url}/v1") as client:
        yield client
    assert stored(shared) == before
    assert shared.engine.requests == []


def upload(client, content: bytes = JSONL, **options):
    return client.files.create(file=("in.jsonl", content), purpose="batch", **options)


def create(client, file_id: str, **options):
    options = {"endpoint": CHAT, "completion_window": "24h"} | options
    return client.batches.create(input_file_id=file_id, **options)


def stored(server) -> list[str]:
    """Names of everything in the storage folder's two folders."""
    storage = server.batches._storage
    return [path.name for folder in (storage.files, storage.uploads) for path in folder.iterdir()]


# ---------------------------------------------------------------------- files


def test_a_file_goes_in_and_out(server, client):
    file = upload(client)
    assert (file.object, file.purpose, file.status) == ("file", "batch", "processed")
    assert (file.filename, file.bytes) == ("in.jsonl", len(JSONL))
    assert file.expires_at - file.created_at == 30 * 86400
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == JSONL
    assert client.files.wait_for_processing(file.id) == file
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    assert stored(server) == []


async def test_the_asynchronous_client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        file = await client.files.create(file=("in.jsonl", io.BytesIO(JSONL)), purpose="batch")
        assert await client.files.retrieve(file.id) == file
        batch = await create(client, file.id)
        while (batch := await client.batches.retrieve(batch.id)).status != "completed":
            server.clock.now_s += 1
        assert [b.id async for b in client.batches.list()] == [batch.id]
        output = await client.files.content(batch.output_file_id)
        assert len(output.text.splitlines()) == 3
        assert len([f async for f in client.files.list()]) == 2
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)


def test_a_large_file_is_the_same_when_it_comes_back(client):
    content = bytes(range(256)) * 80_000  # with every boundary-like byte
    file = upload(client, content)
    assert client.files.content(file.id).read() == content


def test_a_client_may_say_when_a_file_expires(server, client):
    file = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    server.clock.now_s += 3601
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert list(client.files.list()) == []
    server.wait_until(lambda: stored(server) == [])


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": None}, "purpose"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after"),
        ({"expires_after[anchor]": "created_at"}, "expires_after"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "9"}, "expires_after"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "-1"}, "expires_after"),
        ({"purpose": "x" * 5000}, "purpose"),
    ],
)
def test_a_wrong_form_is_refused_and_leaves_nothing(refusing, form, param):
    data = {k: v for k, v in ({"purpose": "batch"} | form).items() if v is not None}
    answer = refusing.post("/files", files={"file": ("a.jsonl", JSONL)}, data=data)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)


def part(headers: str, body: str = "x") -> str:
    return f"--B\r\n{headers}\r\n\r\n{body}\r\n"


FILE = 'Content-Disposition: form-data; name="file"; filename="a"'


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", "{}"),
        ("multipart/form-data", "--B--"),
        ("multipart/form-data; boundary=B", ""),
        ("multipart/form-data; boundary=B", "nonsense"),
        ("multipart/form-data; boundary=B", "--B--\r\n"),
        ("multipart/form-data; boundary=B", part(FILE)),  # the end is missing
        ("multipart/form-data; boundary=B", part(FILE.replace('; filename="a"', "")) + "--B--"),
        ("multipart/form-data; boundary=B", part(FILE) * 2 + "--B--"),
        ("multipart/form-data; boundary=B", part('X: "y"') * 99 + "--B--"),
        (f"multipart/form-data; boundary={'B' * 999}", "x"),
    ],
)
def test_what_is_no_form_with_a_file_is_refused(refusing, content_type, body):
    headers = {"content-type": content_type}
    answer = refusing.post("/files", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\in.jsonl", "in.jsonl"),
        ("/", "upload"),
        ("x" * 999, "x" * 255),
    ],
)
def test_a_file_name_is_for_show(server, client, given, shown):
    file = client.files.create(file=(given, JSONL), purpose="batch")
    assert file.filename == shown
    assert stored(server) == [file.id]
    assert client.files.content(file.id).read() == JSONL


IDS = ["file-0", "..", "%2e%2e%2fbatch.db", "..%2Fbatch.db", "%2Fetc%2Fpasswd", "x%00", "batch.db"]


@pytest.mark.parametrize("file_id", IDS)
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("GET", "/content"), ("DELETE", "")])
def test_an_id_that_is_not_there_reads_nothing(shared, file_id, method, suffix):
    connection = http.client.HTTPConnection(shared.url.removeprefix("http://"))
    connection.request(method, f"/v1/files/{file_id}{suffix}")  # the path goes out as it is
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == 404
    assert b"SQLite" not in body
    assert b"root:" not in body
    assert shared.batches._storage.database.exists()


def test_a_file_that_is_too_large_is_cut_off(start_server, connect):
    server = start_server(max_file_bytes=100_000)
    client = connect(server)
    upload(client, b"x" * 100_000)
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, b"x" * 100_001)
    assert caught.value.status_code == 413
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, b"x" * 10_000_000)
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
    assert len(stored(server)) == 1


async def test_an_upload_is_not_read_beyond_its_limit(tmp_path):
    sent_bytes = 0

    async def endless():
        nonlocal sent_bytes
        yield part(FILE).removesuffix("x\r\n").encode()
        while True:
            sent_bytes += 65_536
            yield b"x" * 65_536

    kind, path = "multipart/form-data; boundary=B", tmp_path / "upload"
    with pytest.raises(UploadTooLarge):
        await receive_upload(kind, endless(), path, 5_000_000)
    assert sent_bytes < 5_200_000
    assert path.stat().st_size <= 5_000_000


def test_the_storage_has_a_limit(start_server, connect):
    server = start_server(max_storage_bytes=len(JSONL) + 600)
    client = connect(server)
    file = upload(client)
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client)
    assert (caught.value.status_code, caught.value.code) == (413, "storage_full")
    client.files.delete(file.id)
    upload(client)


def test_an_upload_that_breaks_off_leaves_nothing(server):
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Type", "multipart/form-data; boundary=B")
    connection.putheader("Content-Length", "10000000")
    connection.endheaders(part(FILE, "x" * 1_500_000).encode())
    server.wait_until(lambda: stored(server))
    connection.close()
    server.wait_until(lambda: stored(server) == [])


def test_files_are_listed_in_pages(client, http_client):
    files = [upload(client) for _ in range(5)]
    newest = [file.id for file in reversed(files)]
    assert [f.id for f in client.files.list(limit=2)] == newest
    assert [f.id for f in client.files.list(limit=2, order="asc")] == newest[::-1]
    assert [f.id for f in client.files.list(purpose="batch")] == newest
    assert [f.id for f in client.files.list(purpose="batch_output")] == []
    page = http_client.get("/files", params={"limit": 2, "after": newest[1]}).json()
    assert [f["id"] for f in page.pop("data")] == newest[2:4]
    assert page == {
        "object": "list",
        "first_id": newest[2],
        "last_id": newest[3],
        "has_more": True,
    }


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/files?limit=0", "limit"),
        ("/files?limit=10001", "limit"),
        ("/files?limit=x", "limit"),
        pytest.param("/files?limit=" + "1" * 5000, "limit", id="more digits than Python reads"),
        pytest.param("/batches?limit=" + "1" * 5000, "limit", id="of batches too"),
        ("/files?order=up", "order"),
        ("/files?after=file-x", "after"),
        ("/batches?limit=101", "limit"),
        ("/batches?after=batch_x", "after"),
        ("/batches/batch_x", "batch_id"),
    ],
)
def test_a_wrong_query_is_refused(refusing, path, param):
    answer = refusing.get(path)
    assert answer.status_code == (404 if param in ("after", "batch_id") else 400)
    assert answer.json()["error"]["param"] == param


# -------------------------------------------------------------------- batches


def test_a_new_batch_is_shown_whole(server, http_client, client):
    server.engine.gate.clear()
    file = upload(client)
    asked = {
        "input_file_id": file.id,
        "endpoint": CHAT,
        "completion_window": "24h",
        "metadata": {"a": "b"},
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
    }
    batch = http_client.post("/batches", json=asked).json()
    now = batch["created_at"]
    unset = {"errors", "output_file_id", "error_file_id", "in_progress_at", "finalizing_at"}
    unset |= {"completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at"}
    unset |= {"model", "usage"}
    assert batch == dict.fromkeys(unset) | {
        "id": batch["id"],
        "object": "batch",
        "endpoint": CHAT,
        "input_file_id": file.id,
        "completion_window": "24h",
        "status": "validating",
        "created_at": now,
        "expires_at": now + 86400,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": {"a": "b"},
    }
    server.engine.gate.set()
    batch = server.wait_until(lambda: _done(client, batch["id"]))
    output = client.files.retrieve(batch.output_file_id)
    assert output.expires_at == output.created_at + 3600


def _done(client, batch_id: str):
    batch = client.batches.retrieve(batch_id)
    return batch if batch.status == "completed" else None


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"endpoint": "/flush_cache"}, "endpoint"),
        ({"completion_window": "1w"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, f"metadata.{'k' * 64}..."),
        ({"metadata": {"a": "b", "k": "x" * 513}}, "metadata.k"),
        ({"metadata": {"a": "b", "k": 1}}, "metadata.k"),
        ({"metadata": {"k": None}}, "metadata.k"),
        ({"metadata": ["k"]}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "x", "seconds": 3600}}, "output_expires_after"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
def test_a_wrong_batch_is_refused(refusing, changes, param):
    file_id = refusing.post("/files", files={"file": ("a", JSONL)}, data={"purpose": "batch"})
    asked = {"endpoint": CHAT, "completion_window": "24h"}
    asked["input_file_id"] = file_id.json()["id"]
    answer = refusing.post("/batches", json=asked | changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)
    assert refusing.get("/batches").json()["data"] == []
    assert refusing.delete(f"/files/{asked['input_file_id']}").status_code == 200


@pytest.mark.parametrize("content", ["", "[]", "{nope", "{}", '"' + "x" * 100_000 + '"'])
def test_what_is_no_batch_is_refused(refusing, content):
    answer = refusing.post("/batches", content=content)
    assert answer.status_code == (413 if len(content) > 70_000 else 400)
    assert answer.json()["error"]["message"]


def test_a_batch_of_no_file(client):
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, "file-x")
    assert caught.value.param == "input_file_id"


def test_batches_are_listed_newest_first(client):
    file = upload(client)
    ids = [create(client, file.id).id for _ in range(5)]
    assert [batch.id for batch in client.batches.list(limit=2)] == ids[::-1]


def test_an_idempotency_key_makes_one_batch(server, client):
    file = upload(client)
    headers = {"Idempotency-Key": "k"}
    first = create(client, file.id, extra_headers=headers)
    assert create(client, file.id, extra_headers=headers).id == first.id
    server.wait_until(lambda: _done(client, first.id))
    again = create(client, file.id, extra_headers=headers)
    assert (again.id, again.status) == (first.id, "completed")
    assert len(server.engine.requests) == 3


def test_a_batch_that_is_over_cannot_be_cancelled(server, client):
    batch = create(client, upload(client).id)
    server.wait_until(lambda: _done(client, batch.id))
    with pytest.raises(openai.BadRequestError, match="completed cannot be cancelled"):
        client.batches.cancel(batch.id)


def test_the_input_of_a_running_batch_cannot_be_deleted(server, client):
    server.engine.gate.clear()
    file = upload(client)
    batch = create(client, file.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.delete(file.id)
    assert caught.value.code == "file_in_use"
    server.engine.gate.set()
    server.wait_until(lambda: _done(client, batch.id))
    assert client.files.delete(file.id).deleted


def test_old_batches_go(start_server, connect):
    server = start_server(retention_hours=1.0)
    client = connect(server)
    batch = create(client, upload(client).id)
    server.wait_until(lambda: _done(client, batch.id))
    server.clock.now_s += 3700
    server.wait_until(lambda: list(client.batches.list()) == [] and stored(server) == [])


# ------------------------------------------------------------------------- key


def test_every_route_is_behind_the_servers_key(start_server):
    server = start_server(api_key="secret")
    routes = [route for route in server.engine.app.routes if "batch" in getattr(route, "tags", ())]
    assert len(routes) == 9
    for route in routes:
        (method,) = route.methods
        for headers in ({}, {"authorization": "Bearer wrong"}):
            answer = httpx.request(method, server.url + route.path, headers=headers)
            assert answer.status_code == 401


def test_a_disk_that_is_full_is_said_to_be(server, client, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("conserve_sgl.batch.server.upload._write_all", refuse)
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client)
    assert (caught.value.status_code, caught.value.code) == (507, "storage_error")
    monkeypatch.undo()
    assert stored(server) == []
    assert json.loads(client.files.content(upload(client, jsonl(request("a"))).id).read())


# ------------------------------------------------------------------- the status


def open_batches(server) -> list[BatchLine]:
    loop = server.engine.loop
    return asyncio.run_coroutine_threadsafe(server.batches.open_batches(), loop).result(10)


def test_batches_that_have_not_ended_are_shown_as_far_as_they_are(server, client):
    assert open_batches(server) == []
    server.engine.gate.clear()
    batch = create(client, upload(client).id)
    server.wait_until(lambda: open_batches(server)[0].total == 3)
    (line,) = open_batches(server)
    assert (line.id, line.completed, line.failed) == (batch.id, 0, 0)
    assert (line.created_at_s, line.expires_at_s) == (batch.created_at, batch.expires_at)
    server.engine.gate.set()
    server.wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
    assert open_batches(server) == []
