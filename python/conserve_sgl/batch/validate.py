"""Reads a batch's input file a line at a time: what is wrong with it, and the order to send it in.

What stays in memory is a few dozen bytes a line (where it is in the file, its custom_id while
duplicates are looked for, four digests for the order), never the lines themselves.

The order puts requests with a long common prefix next to each other, where the engine's prefix
cache still has it. Lines are sorted by digests of the first 256, 1024, 4096 and 16384 bytes of
their prompt: lines that agree on the longer prefix are neighbours within those that agree on the
shorter one. Ties keep the file's order.
"""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec

from conserve_sgl.batch.schema import EMBEDDINGS, ENDPOINTS, BatchError
from conserve_sgl.errors import ConserveError

__all__ = ["InputRefused", "Limits", "Plan", "RequestLine", "read_plan", "read_request"]

MAX_ERRORS = 100
MAX_CUSTOM_ID = 512
BREATH_BYTES = 1 << 20
_PREFIX_BYTES = (256, 1024, 4096, 16384)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much a file may hold. The defaults are OpenAI's, but for the line."""

    max_requests: int = 50_000
    max_line_bytes: int = 16 << 20
    max_embedding_inputs: int = 50_000


class RequestLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of an input file; `body` is the JSON of the request as it stands there."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class InputRefused(ConserveError):
    """An input file cannot be run: `errors` holds at most 100 faults, in the file's order."""

    def __init__(self, errors: list[BatchError]) -> None:
        self.errors = errors
        super().__init__(errors[0].message)


class Plan:
    """The lines of a file that are to be sent, in the order of sending.

    Args:
        model: what all lines name, or None when none does.
        total: lines in the file, those that are not to be sent included.
        apart: offset and length of those that are to be sent too, but not among the others.
    """

    def __init__(
        self,
        model: str | None,
        total: int,
        offsets: array[int],
        lengths: array[int],
        apart: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.model = model
        self.total = total
        self.apart = apart
        self._offsets = offsets
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Offset and length in bytes of each line."""
        return zip(self._offsets, self._lengths, strict=True)


class _Body(msgspec.Struct, frozen=True):
    """What of a request's body matters here; the rest is for the route to judge."""

    model: str | None = None
    stream: object = None
    background: object = None
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")

    @property
    def text(self) -> bytes:
        return bytes(self.messages or self.prompt or self.input)


class _Fault(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


_decode_line = msgspec.json.Decoder(RequestLine).decode
_decode_body = msgspec.json.Decoder(_Body).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_NULL = msgspec.Raw(b"null")
_decode_inputs = msgspec.json.Decoder(list[msgspec.Raw]).decode


def read_plan(
    path: Path,
    endpoint: str | None,
    limits: Limits,
    *,
    done: Collection[str] = (),
    apart: Collection[str] = (),
    breathe: Callable[[], None] = lambda: None,
) -> Plan:
    """Check every line of the file at `path`; the plan leaves out those whose custom_id is `done`.

    Args:
        endpoint: what every line's url must be; None takes any of ENDPOINTS.
        apart: custom_ids of lines that go into `Plan.apart`.
        breathe: called about every MiB; may sleep, and may raise to stop the reading.

    Raises:
        InputRefused: naming each faulty line.
        OSError: the file cannot be read.
    """
    reader = _Reader(endpoint, limits, done, apart)
    read_bytes = 0
    with path.open("rb") as file:
        for number, offset, raw in _lines(file, limits.max_line_bytes):
            reader.take(number, offset, raw)
            if reader.has_enough:
                break
            read_bytes += len(raw or b"")
            if read_bytes >= BREATH_BYTES:
                read_bytes = 0
                breathe()
    return reader.plan()


def read_request(fd: int, offset: int, length: int) -> RequestLine:
    """The line at `offset` of an open file whose plan has been read, as it is to be sent.

    Fields of its body that are null are left out: to OpenAI they say nothing, and SGLang refuses
    them.

    Raises:
        OSError: it cannot be read, or is not the line that it was.
    """
    try:
        line = _decode_line(os.pread(fd, length, offset))
        return _without_nulls(line) if b"null" in bytes(line.body) else line
    except msgspec.MsgspecError as e:
        raise OSError(f"the input file changed while its batch ran: {e}") from e


def _without_nulls(line: RequestLine) -> RequestLine:
    fields = {name: raw for name, raw in _decode_fields(line.body).items() if raw != _NULL}
    return msgspec.structs.replace(line, body=msgspec.Raw(msgspec.json.encode(fields)))


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Number from 1, offset and bytes of each line that is not blank; None when it is too long."""
    offset = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
    file.seek(offset)
    number = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        length = len(raw)
        too_long = length > max_bytes
        while too_long and not raw.endswith(b"\n") and (raw := file.readline(BREATH_BYTES)):
            length += len(raw)
        if too_long:
            yield number, offset, None
        elif not raw.isspace():
            yield number, offset, raw
        offset += length


class _Reader:
    """Takes the lines of one file one after the other."""

    def __init__(
        self,
        endpoint: str | None,
        limits: Limits,
        done: Collection[str],
        apart: Collection[str],
    ) -> None:
        self.errors: list[BatchError] = []
        self._endpoint = endpoint
        self._limits = limits
        self._done = done
        self._apart = apart
        self._seen: set[str] = set()
        self._model: str | None = None
        self._total = 0
        self._inputs = 0
        self._lines: list[tuple[bytes, int, int]] = []
        self._lines_apart: list[tuple[int, int]] = []

    def take(self, number: int, offset: int, raw: bytes | None) -> None:
        self._total += 1
        try:
            self._check(offset, raw)
        except _Fault as fault:
            self._refuse(fault, number)

    @property
    def has_enough(self) -> bool:
        """Whether nothing that follows could matter."""
        return len(self.errors) >= MAX_ERRORS or self._total > self._limits.max_requests

    def plan(self) -> Plan:
        if self._total == 0:
            self._refuse(_Fault("empty_file", "the file has no requests"), None)
        if self.errors:
            raise InputRefused(self.errors)
        self._lines.sort()
        offsets = array("Q", (offset for _, offset, _ in self._lines))
        lengths = array("L", (length for _, _, length in self._lines))
        return Plan(self._model, self._total, offsets, lengths, self._lines_apart)

    def _refuse(self, fault: _Fault, line: int | None) -> None:
        error = BatchError(code=fault.code, message=str(fault), param=fault.param, line=line)
        self.errors.append(error)

    def _check(self, offset: int, raw: bytes | None) -> None:
        if self._total > self._limits.max_requests:
            raise _Fault("too_many_requests", f"more than {self._limits.max_requests} requests")
        if raw is None:
            raise _Fault("line_too_long", f"longer than {self._limits.max_line_bytes} bytes")
        line = _parsed(raw)
        self._check_envelope(line)
        body = _parsed_body(line.body)
        self._check_model(body.model)
        if line.url == EMBEDDINGS:
            self._count_inputs(body.input)
        if line.custom_id in self._done:
            return
        if line.custom_id in self._apart:
            self._lines_apart.append((offset, len(raw)))
        else:
            self._lines.append((_digests(body.text), offset, len(raw)))

    def _check_envelope(self, line: RequestLine) -> None:
        if not 1 <= len(line.custom_id) <= MAX_CUSTOM_ID:
            raise _Fault(
                "invalid_custom_id", f"must have 1 to {MAX_CUSTOM_ID} characters", "custom_id"
            )
        if line.custom_id in self._seen:
            raise _Fault(
                "duplicate_custom_id", f"{line.custom_id!r} was on an earlier line", "custom_id"
            )
        self._seen.add(line.custom_id)
        if line.method != "POST":
            raise _Fault("invalid_method", f"must be POST, not {line.method!r}", "method")
        allowed = ENDPOINTS if self._endpoint is None else (self._endpoint,)
        if line.url not in allowed:
            raise _Fault("invalid_url", f"must be {' or '.join(allowed)}, not {line.url!r}", "url")

    def _check_model(self, model: str | None) -> None:
        if len(self._seen) == 1:
            self._model = model
        elif model != self._model:
            raise _Fault(
                "mismatched_model",
                f"{model!r}, and the first line has {self._model!r}: one model for all lines",
                "body.model",
            )

    def _count_inputs(self, inputs: msgspec.Raw) -> None:
        try:
            many = _decode_inputs(inputs)
        except (msgspec.MsgspecError, RecursionError):
            many = [inputs]
        # A list of numbers is one input in tokens.
        texts = [one for one in many if bytes(one).startswith((b'"', b"[", b"{"))]
        self._inputs += len(texts) or 1
        if self._inputs > self._limits.max_embedding_inputs:
            most = self._limits.max_embedding_inputs
            raise _Fault("too_many_inputs", f"more than {most} texts to embed", "body.input")


def _parsed(raw: bytes) -> RequestLine:
    try:
        raw.decode()  # msgspec does not look into strings that it passes over
        return _decode_line(raw)
    except msgspec.ValidationError as e:
        code = "missing_required_parameter" if "missing required" in str(e) else "invalid_request"
        raise _Fault(code, str(e)) from e
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise _Fault("invalid_json_line", f"is not JSON: {e}") from e


def _parsed_body(raw: msgspec.Raw) -> _Body:
    try:
        body = _decode_body(raw)
    except msgspec.ValidationError as e:
        raise _Fault("invalid_request", f"body: {e}", "body") from e
    if body.stream not in (None, False):
        raise _Fault("invalid_request", "a batch cannot stream", "body.stream")
    if body.background not in (None, False):
        raise _Fault("invalid_request", "a batch is in the background as it is", "body.background")
    return body


def _digests(text: bytes) -> bytes:
    return b"".join(blake2b(text[:size], digest_size=8).digest() for size in _PREFIX_BYTES)
