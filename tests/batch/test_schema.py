from __future__ import annotations

import msgspec
import pytest
from openai.types import Batch as OpenAIBatch
from openai.types import FileObject as OpenAIFile

from conserve_sgl.batch.schema import (
    Batch,
    BatchError,
    BatchErrors,
    FileObject,
    Usage,
    new_batch_id,
    new_file_id,
    window_s,
)


@pytest.mark.parametrize(
    ("window", "seconds"), [("1m", 60), ("30m", 1800), ("24h", 86400), ("7d", 604800)]
)
def test_a_completion_window_is_a_number_and_a_unit(window, seconds):
    assert window_s(window) == seconds


@pytest.mark.parametrize(
    "window", ["", "24", "h", "0h", "-1h", "1.5h", "24H", "24h ", "1w", "999999d"]
)
def test_other_windows_are_refused(window):
    with pytest.raises(ValueError, match="such as 24h"):
        window_s(window)


def test_ids_cannot_be_guessed():
    assert len({new_file_id() for _ in range(1000)} | {new_batch_id() for _ in range(1000)}) == 2000
    assert len(new_file_id().removeprefix("file-")) == 32  # 128 bits


BATCH = Batch(
    id="batch_1",
    endpoint="/v1/completions",
    input_file_id="file-1",
    completion_window="24h",
    status="validating",
    created_at=1,
    expires_at=86401,
)


def test_a_new_batch_has_every_field_that_the_official_client_knows():
    shown = msgspec.to_builtins(BATCH)
    assert set(shown) == set(OpenAIBatch.model_fields)
    assert shown["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert shown["errors"] is None
    OpenAIBatch.model_validate(shown, strict=True)


def test_a_failed_batch_with_usage_is_what_the_official_client_expects():
    errors = BatchErrors(data=[BatchError(code="c", message="m", line=3)])
    batch = msgspec.structs.replace(BATCH, status="failed", errors=errors, usage=Usage())
    seen = OpenAIBatch.model_validate(msgspec.to_builtins(batch), strict=True)
    assert (seen.errors.data[0].line, seen.usage.input_tokens_details.cached_tokens) == (3, 0)


def test_a_file_has_every_field_that_the_official_client_knows():
    file = FileObject(id="file-1", bytes=1, created_at=2, filename="a.jsonl", purpose="batch")
    shown = msgspec.to_builtins(file)
    assert set(shown) == set(OpenAIFile.model_fields)
    OpenAIFile.model_validate(shown, strict=True)


def test_usage_adds_up():
    one = msgspec.convert(
        {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 2},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 1},
            "total_tokens": 8,
        },
        Usage,
    )
    both = msgspec.to_builtins(one.plus(one))
    assert both == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 16,
    }
