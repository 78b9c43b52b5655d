"""The objects of OpenAI's Files and Batches, and the lines of their files.

Shapes: the types of openai 2.8.0 and the OpenAI specification (openai-openapi). Times are whole
seconds since 1970.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, Literal

import msgspec

__all__ = [
    "ACTIVE",
    "EMBEDDINGS",
    "ENDPOINTS",
    "Batch",
    "BatchError",
    "BatchErrors",
    "BatchRecord",
    "FileObject",
    "LineError",
    "LineResponse",
    "RequestCounts",
    "ResultLine",
    "Usage",
    "failed_line",
    "new_batch_id",
    "new_file_id",
    "new_line_id",
    "new_request_id",
    "result_line",
    "window_s",
]

EMBEDDINGS = "/v1/embeddings"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", EMBEDDINGS, "/v1/responses")
"""Where the lines of a batch may go; the only routes that a batch ever reaches."""

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
ACTIVE: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
"""The states that a batch leaves by itself."""

_UNIT_S = {"m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])")


def window_s(window: str) -> int:
    """The seconds of a completion window such as 30m, 24h or 7d.

    Raises:
        ValueError: it is not of that form.
    """
    match = _WINDOW.fullmatch(window)
    if match is None:
        raise ValueError(f"must be a number and m, h or d, such as 24h, not {window!r}")
    return int(match[1]) * _UNIT_S[match[2]]


def new_file_id() -> str:
    """A file id that nobody can guess."""
    return f"file-{secrets.token_hex(16)}"


def new_batch_id() -> str:
    """A batch id that nobody can guess."""
    return f"batch_{secrets.token_hex(16)}"


def new_line_id() -> str:
    """The id of one line's result."""
    return f"batch_req_{secrets.token_hex(12)}"


def new_request_id() -> str:
    """An id for an answer whose server gave none."""
    return f"req_{secrets.token_hex(12)}"


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    pass


class FileObject(_Record):
    """A file as the API shows it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None


class BatchError(_Record):
    """Why a batch failed; `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(_Record):
    data: list[BatchError]
    object: Literal["list"] = "list"


class RequestCounts(_Record):
    """`failed` counts the lines of the error file, expired ones included."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputDetails(_Record):
    cached_tokens: int = 0


class OutputDetails(_Record):
    reasoning_tokens: int = 0


class Usage(_Record):
    """Tokens of the lines answered so far."""

    input_tokens: int = 0
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int = 0
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int = 0

    def plus(self, other: Usage) -> Usage:
        """The sum of both."""
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            input_tokens_details=InputDetails(
                cached_tokens=self.input_tokens_details.cached_tokens
                + other.input_tokens_details.cached_tokens
            ),
            output_tokens=self.output_tokens + other.output_tokens,
            output_tokens_details=OutputDetails(
                reasoning_tokens=self.output_tokens_details.reasoning_tokens
                + other.output_tokens_details.reasoning_tokens
            ),
            total_tokens=self.total_tokens + other.total_tokens,
        )


class Batch(_Record):
    """A batch as the API shows it."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Status
    created_at: int
    expires_at: int
    object: Literal["batch"] = "batch"
    model: str | None = None
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: Usage | None = None
    metadata: dict[str, str] | None = None


class BatchRecord(_Record):
    """A batch as the store keeps it.

    Args:
        batch: what the API shows.
        output_id, error_id: ids of the result files, which the API shows once they are complete.
        output_expires_s: how long result files are kept, or None for the server's retention.
        ending: how the batch will end, once it is `finalizing`.
    """

    batch: Batch
    output_id: str
    error_id: str
    output_expires_s: int | None = None
    ending: Literal["completed", "expired"] | None = None

    def with_batch(self, **changes: Any) -> BatchRecord:
        """This record with other values in its batch."""
        return msgspec.structs.replace(self, batch=msgspec.structs.replace(self.batch, **changes))


class LineResponse(_Record):
    """An HTTP answer; `body` is JSON."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(_Record):
    """Why there is no HTTP answer."""

    code: str
    message: str


class ResultLine(_Record):
    """A line of an output file (status 200) or of an error file (everything else)."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None

    @property
    def succeeded(self) -> bool:
        """Whether it belongs in the output file."""
        return self.response is not None and self.response.status_code == 200


def failed_line(custom_id: str, code: str, message: str) -> ResultLine:
    """The error line of a request that got no HTTP answer."""
    error = LineError(code=code, message=message)
    return ResultLine(id=new_line_id(), custom_id=custom_id, response=None, error=error)


def result_line(custom_id: str, status: int, body: bytes, request_id: str) -> ResultLine:
    """The line for an HTTP answer."""
    try:
        text = body.decode()
        json = msgspec.json.format(text, indent=-1).encode()  # on one line
    except (msgspec.DecodeError, UnicodeDecodeError):
        json = msgspec.json.encode({"error": {"message": body.decode(errors="replace")}})
    response = LineResponse(status_code=status, request_id=request_id, body=msgspec.Raw(json))
    return ResultLine(id=new_line_id(), custom_id=custom_id, response=response, error=None)
