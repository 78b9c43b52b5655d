"""What runs beside what, read from a trace; the trace itself comes from a GPU."""

from __future__ import annotations

import gzip
import json

import pytest

from conserve_sgl.bench.micro.overlap import main, read_streams, table
from conserve_sgl.errors import InputError


def work(stream: int, start: float, took: float, name: str = "gemm", cat: str = "kernel") -> dict:
    event = {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": took}
    return event | {"args": {"stream": stream, "device": 0}}


COMPUTE = [work(7, 0, 100), work(7, 100, 100), work(7, 300, 100), work(7, 320, 20)]
COPIES = [
    work(20, 150, 100, "Memcpy DtoH (Device -> Pinned)", "gpu_memcpy"),  # half of it beside
    work(20, 310, 50, "transfer_kernel<2>(int)"),
    work(20, 390, 10, "transfer_kernel<2>(long)"),
]
HOST = [
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 900, "args": {}},
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
]


def write(path, events):
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_each_stream_is_set_against_the_one_that_computes(tmp_path):
    compute, copies = read_streams(write(tmp_path / "t.json.gz", [*HOST, *COPIES, *COMPUTE]))
    assert (compute.number, compute.operations) == (7, 4)
    assert compute.busy_s == pytest.approx(300e-6)  # one kernel ran within another
    assert compute.beside_s == pytest.approx(300e-6)
    assert (copies.number, copies.operations) == (20, 3)
    assert copies.busy_s == pytest.approx(160e-6)
    assert copies.beside_s == pytest.approx(110e-6)
    assert (compute.most, copies.most) == ("gemm", "Memcpy DtoH")


def test_the_table_has_a_line_for_each_stream(tmp_path, capsys):
    path = write(tmp_path / "t.json.gz", [*COMPUTE, *COPIES])
    main(["--trace", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| 7 | 4 | 0.3 ms | it is this one | `gemm` |"
    assert lines[-1] == "| 20 | 3 | 0.2 ms | 69% | `Memcpy DtoH` |"


def test_a_trace_without_a_gpu_says_so(tmp_path):
    assert table(read_streams(write(tmp_path / "t.json.gz", HOST))) == (
        "The trace holds no work of a GPU.\n"
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"{", gzip.compress(b"[1]", mtime=0), gzip.compress(b"{}", mtime=0)],
    ids=["empty", "cut off", "a list", "an object"],
)
def test_what_is_no_trace_is_named(tmp_path, content):
    path = tmp_path / "t.json.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no trace"):
        read_streams(path)
