"""Streams a multipart upload to disk: never whole in memory, and cut off when it grows too large.

Starlette's own form parser spools a file of any size to the system's temporary folder before the
route sees it, so this one feeds `python_multipart` itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from conserve_sgl.errors import ConserveError

__all__ = ["Upload", "UploadRefused", "UploadTooLarge", "receive_upload"]

MAX_FIELD_BYTES = 1024
MAX_PARTS = 16
MAX_FILENAME = 255
_FLUSH_BYTES = 1 << 20


class UploadRefused(ConserveError):
    """The form cannot be taken; `param` names the field that is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UploadTooLarge(UploadRefused):
    """The file is larger than is taken."""


class Upload(msgspec.Struct, frozen=True):
    """A form whose file is on disk.

    Args:
        filename: the client's name for it, without folders; for show, never a path.
        fields: the other fields.
    """

    filename: str
    size_bytes: int
    fields: dict[str, str]


async def receive_upload(
    content_type: str, chunks: AsyncIterator[bytes], path: Path, max_bytes: int
) -> Upload:
    """Write the form's field `file` to `path`; after an error a part of it may be there.

    Raises:
        UploadTooLarge: as soon as more than `max_bytes` of it have come.
        UploadRefused: it is not a form with one file.
        OSError: the disk did not take it.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise UploadRefused("the request must be multipart/form-data with a boundary")
    form = _Form(max_bytes)
    file = await asyncio.to_thread(path.open, "wb", buffering=0)
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        async for chunk in chunks:
            parser.write(chunk)
            if len(form.content) >= _FLUSH_BYTES:
                await asyncio.to_thread(_write_all, file, form.take())
        await asyncio.to_thread(_write_all, file, form.take())
    except FormParserError as e:
        raise UploadRefused(f"the form cannot be read: {e}") from e
    finally:
        file.close()
    return form.upload()


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class _Form:
    """Collects what the parser finds; `content` is what was not written yet."""

    def __init__(self, max_bytes: int) -> None:
        self.content = bytearray()
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._parts = 0
        self._whole = False
        self._in_file = False
        self._name = ""
        self._value = bytearray()
        self._header = bytearray()
        self._header_value = bytearray()
        self._disposition = b""

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers,
            "on_part_data": self._on_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def take(self) -> bytes:
        """What is to be written next."""
        data, self.content = self.content, bytearray()
        return bytes(data)

    def upload(self) -> Upload:
        if not self._whole:
            raise UploadRefused("the form ends before its last part does")
        if self._filename is None:
            raise UploadRefused("a file is required", "file")
        return Upload(self._filename, self._size_bytes, self._fields)

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise UploadRefused(f"more than {MAX_PARTS} fields")
        self._value.clear()
        self._header.clear()
        self._header_value.clear()
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._in_file = self._name == "file"
        if not self._in_file:
            return
        if self._filename is not None:
            raise UploadRefused("only one file at a time", "file")
        if b"filename" not in options:
            raise UploadRefused("must be a file, not a text field", "file")
        self._filename = _shown_name(options[b"filename"].decode(errors="replace"))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise UploadRefused(f"longer than {MAX_FIELD_BYTES} bytes", self._name)
            return
        self._size_bytes += end - start
        if self._size_bytes > self._max_bytes:
            raise UploadTooLarge(f"the file is larger than {self._max_bytes} bytes", "file")
        self.content += data[start:end]

    def _on_part_end(self) -> None:
        if not self._in_file:
            self._fields[self._name] = self._value.decode(errors="replace")

    def _on_end(self) -> None:
        self._whole = True


def _shown_name(name: str) -> str:
    base = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in base if c.isprintable())[:MAX_FILENAME] or "upload"
