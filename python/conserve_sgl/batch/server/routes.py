"""The nine routes of OpenAI's Files and Batches.

Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. Who may call them is
decided around the application, by the server's own API key.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse

from conserve_sgl.batch.schema import (
    Batch,
    BatchRecord,
    FileObject,
    new_batch_id,
    new_file_id,
    window_s,
)
from conserve_sgl.batch.server.processor import BatchProcessor, NotCancellable
from conserve_sgl.batch.server.store import FileInUse, Page, Store
from conserve_sgl.batch.server.upload import UploadRefused, UploadTooLarge, receive_upload
from conserve_sgl.client.clock import Clock
from conserve_sgl.config import BatchConfig
from conserve_sgl.errors import ConserveError, StorageError

__all__ = ["add_batch_routes"]

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 10
_MOST_DIGITS = 18
EXPIRES_S = (3600, 2_592_000)
_FORM_BYTES = 64 << 10
"""What a multipart form may have beside its file."""

Seconds = Annotated[int, msgspec.Meta(ge=EXPIRES_S[0], le=EXPIRES_S[1])]
_KEY_CHARACTERS, _VALUE_CHARACTERS = 64, 512
"""Of `metadata`."""


class _ExpiresAfter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    anchor: Literal["created_at"]
    seconds: Seconds


class _CreateBatch(msgspec.Struct, frozen=True, kw_only=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[str, Any], msgspec.Meta(max_length=16)] | None = None
    output_expires_after: _ExpiresAfter | None = None


class _Refused(ConserveError):
    """Answered with `status`."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def add_batch_routes(
    app: FastAPI,
    store: Callable[[], Store],
    processor: Callable[[], BatchProcessor],
    config: BatchConfig,
    endpoints: Sequence[str],
    clock: Clock,
) -> None:
    """Put the routes on `app`, each by itself: SGLang labels its metrics by a route's path.

    Args:
        store, processor: asked for when a route is called, after the start.
        endpoints: those that a batch may name.
    """
    api = _Api(store, processor, config, endpoints, clock)
    for method, path, handler in (
        ("POST", "/v1/files", api.create_file),
        ("GET", "/v1/files", api.list_files),
        ("GET", "/v1/files/{file_id}", api.retrieve_file),
        ("GET", "/v1/files/{file_id}/content", api.file_content),
        ("DELETE", "/v1/files/{file_id}", api.delete_file),
        ("POST", "/v1/batches", api.create_batch),
        ("GET", "/v1/batches", api.list_batches),
        ("GET", "/v1/batches/{batch_id}", api.retrieve_batch),
        ("POST", "/v1/batches/{batch_id}/cancel", api.cancel_batch),
    ):
        app.add_api_route(path, _answered(handler), methods=[method], tags=["batch"])


def _answered(handler: Callable[..., Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
    """The handler as a route: structs become JSON, errors of ours OpenAI's errors."""

    @wraps(handler, assigned=("__name__", "__qualname__", "__doc__"))
    async def route(request: Request) -> Response:
        try:
            answer = await handler(request)
        except _Refused as e:
            return _error(e.status, str(e), e.param, e.code)
        except StorageError as e:
            logger.error("%s %s: %s", request.method, request.url.path, e)
            return _error(507, "the server cannot store this now", None, "storage_error")
        return answer if isinstance(answer, Response) else _json(200, answer)

    del route.__wrapped__  # FastAPI would look at the method's parameters
    return route


class _Api:
    def __init__(
        self,
        store: Callable[[], Store],
        processor: Callable[[], BatchProcessor],
        config: BatchConfig,
        endpoints: Sequence[str],
        clock: Clock,
    ) -> None:
        self._get_store = store
        self._get_processor = processor
        self._config = config
        self._endpoints = endpoints
        self._clock = clock

    # ---------------------------------------------------------------- files

    async def create_file(self, request: Request) -> FileObject:
        """Upload a file."""
        store, config, now = self._get_store(), self._config, self._now()
        await self._refuse_full(request)
        path = store.new_upload()
        try:
            upload = await receive_upload(
                request.headers.get("content-type", ""),
                request.stream(),
                path,
                config.max_file_bytes,
            )
            file = FileObject(
                id=new_file_id(),
                bytes=upload.size_bytes,
                created_at=now,
                filename=upload.filename,
                purpose=_purpose(upload.fields.get("purpose")),
                expires_at=now + self._kept_s(upload.fields),
            )
            await store.add_upload(path, file)
        except UploadTooLarge as e:
            raise _Refused(413, str(e), e.param, "file_too_large") from e
        except UploadRefused as e:
            raise _Refused(400, str(e), e.param) from e
        except OSError as e:
            raise StorageError(f"cannot write {path}: {e.strerror or e}") from e
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        return file

    async def list_files(self, request: Request) -> dict[str, Any]:
        """List files."""
        query = request.query_params
        order = query.get("order") or "desc"
        if order not in ("asc", "desc"):
            raise _Refused(400, f"must be asc or desc, not {order!r}", "order")
        page = await self._get_store().files(
            self._now(),
            limit=_limit(query.get("limit"), most=10_000, default=10_000),
            after=query.get("after") or None,
            newest_first=order == "desc",
            purpose=query.get("purpose") or None,
        )
        return _listed(page, query.get("after"))

    async def retrieve_file(self, request: Request) -> FileObject:
        """Show a file."""
        return await self._file(request)

    async def file_content(self, request: Request) -> Response:
        """Download a file."""
        file = await self._file(request)
        path = self._get_store().content(file.id)
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename)

    async def delete_file(self, request: Request) -> dict[str, Any]:
        """Delete a file."""
        file_id = request.path_params["file_id"]
        try:
            if not await self._get_store().delete_file(file_id, self._now()):
                raise _no_such_file(file_id)
        except FileInUse as e:
            raise _Refused(400, str(e), "file_id", "file_in_use") from e
        return {"id": file_id, "object": "file", "deleted": True}

    # -------------------------------------------------------------- batches

    async def create_batch(self, request: Request) -> Batch:
        """Create a batch."""
        record = self._new_record(await _body(request))
        key = request.headers.get("idempotency-key")
        file_id = record.batch.input_file_id
        try:
            record = await self._get_store().create_batch(record, self._now(), key)
        except LookupError as e:
            raise _no_such_file(file_id, "input_file_id") from e
        processor = self._get_processor()
        if record.batch.status == "validating":
            processor.submit(record)
        return processor.shown(record)

    async def list_batches(self, request: Request) -> dict[str, Any]:
        """List batches."""
        query = request.query_params
        page = await self._get_store().batches(
            limit=_limit(query.get("limit"), most=100, default=20),
            after=query.get("after") or None,
        )
        if page is not None:
            shown = self._get_processor().shown
            page = Page([shown(record) for record in page.data], page.has_more)
        return _listed(page, query.get("after"))

    async def retrieve_batch(self, request: Request) -> Batch:
        """Show a batch."""
        return self._get_processor().shown(await self._batch(request))

    async def cancel_batch(self, request: Request) -> Batch:
        """Cancel a batch."""
        try:
            return await self._get_processor().cancel(await self._batch(request))
        except NotCancellable as e:
            raise _Refused(400, str(e), "batch_id") from e

    # -------------------------------------------------------------- helpers

    async def _file(self, request: Request) -> FileObject:
        file_id = request.path_params["file_id"]
        file = await self._get_store().file(file_id, self._now())
        if file is None:
            raise _no_such_file(file_id)
        return file

    async def _batch(self, request: Request) -> BatchRecord:
        batch_id = request.path_params["batch_id"]
        record = await self._get_store().batch(batch_id)
        if record is None:
            raise _Refused(404, f"No such batch: {batch_id}", "batch_id")
        return record

    async def _refuse_full(self, request: Request) -> None:
        """Refuse an upload before it is sent, where its length says enough."""
        size_bytes = _whole(request.headers.get("content-length", "")) or 0
        most_bytes = self._config.max_file_bytes
        if size_bytes > most_bytes + _FORM_BYTES:
            message = f"the file is larger than {most_bytes} bytes"
            raise _Refused(413, message, "file", "file_too_large")
        used_bytes = await self._get_store().used_bytes()
        if used_bytes + size_bytes > self._config.max_storage_bytes:
            message = f"the server keeps {used_bytes} bytes of files already; delete some"
            raise _Refused(413, message, "file", "storage_full")

    def _kept_s(self, fields: dict[str, str]) -> int:
        retention_s = int(self._config.retention_hours * 3600)
        anchor = fields.get("expires_after[anchor]")
        seconds = fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return retention_s
        if anchor != "created_at":
            raise UploadRefused("must be created_at", "expires_after[anchor]")
        low, high = EXPIRES_S
        kept_s = _whole(seconds or "")
        if kept_s is None or not low <= kept_s <= high:
            raise UploadRefused(f"must be from {low} to {high}", "expires_after[seconds]")
        return kept_s

    def _new_record(self, asked: _CreateBatch) -> BatchRecord:
        if asked.endpoint not in self._endpoints:
            message = f"must be one of {', '.join(self._endpoints)}, not {asked.endpoint!r}"
            raise _Refused(400, message, "endpoint")
        try:
            seconds = window_s(asked.completion_window)
        except ValueError as e:
            raise _Refused(400, str(e), "completion_window") from e
        _check_metadata(asked.metadata or {})
        now = self._now()
        batch = Batch(
            id=new_batch_id(),
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            status="validating",
            created_at=now,
            expires_at=now + seconds,
            metadata=asked.metadata,
        )
        kept = asked.output_expires_after
        return BatchRecord(
            batch=batch,
            output_id=new_file_id(),
            error_id=new_file_id(),
            output_expires_s=None if kept is None else kept.seconds,
        )

    def _now(self) -> int:
        return int(self._clock.wall_s())


def _check_metadata(metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        shown = key if len(key) <= _KEY_CHARACTERS else f"{key[:_KEY_CHARACTERS]}..."
        if len(key) > _KEY_CHARACTERS:
            fault = f"the key {shown!r} has more than {_KEY_CHARACTERS} characters"
        elif not isinstance(value, str):
            fault = f"the value of {shown!r} must be text"
        elif len(value) > _VALUE_CHARACTERS:
            fault = f"the value of {shown!r} has more than {_VALUE_CHARACTERS} characters"
        else:
            continue
        raise _Refused(400, fault, f"metadata.{shown}")


def _purpose(given: str | None) -> Literal["batch"]:
    if given != "batch":
        raise UploadRefused(f"must be batch, not {given!r}: this server runs batches", "purpose")
    return "batch"


def _no_such_file(file_id: str, param: str = "file_id") -> _Refused:
    return _Refused(404, f"No such File object: {file_id}", param)


def _limit(given: str | None, *, most: int, default: int) -> int:
    if not given:
        return default
    limit = _whole(given)
    if limit is None or not 1 <= limit <= most:
        raise _Refused(400, f"must be from 1 to {most}", "limit")
    return limit


def _whole(text: str) -> int | None:
    """The number that a client wrote, or None: Python refuses to read thousands of digits."""
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None


def _listed(page: Page | None, after: str | None) -> dict[str, Any]:
    if page is None:
        raise _Refused(404, f"there is no {after}", "after")
    data: Sequence[Any] = page.data
    return {
        "object": "list",
        "data": data,
        "first_id": data[0].id if data else None,
        "last_id": data[-1].id if data else None,
        "has_more": page.has_more,
    }


async def _body(request: Request) -> _CreateBatch:
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise _Refused(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
    try:
        return msgspec.json.decode(raw, type=_CreateBatch)
    except msgspec.ValidationError as e:
        message, _, where = str(e).partition(" - at `")
        param = where.rstrip("`").removeprefix("key` in `").removeprefix("$.")
        raise _Refused(400, message, param or None) from e
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise _Refused(400, f"the body is not JSON: {e}") from e


def _error(status: int, message: str, param: str | None, code: str | None) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return _json(status, {"error": error})


def _json(status: int, answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type="application/json")
