"""Archives of results."""

from __future__ import annotations

import os
import tarfile
import time
from pathlib import Path

import pytest

from conserve_sgl.bench.gpu import archive
from conserve_sgl.bench.gpu.archive import Packer, unpack
from conserve_sgl.errors import InputError


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for name, text in (("bench/runs/a.1/run.json", "{}"), ("costs/resume.md", "| a |")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def packer(results: Path, out: Path) -> Packer:
    return Packer(out, lambda: {path.name: path for path in results.iterdir()})


def test_every_folder_becomes_an_archive_that_restores_it(results: Path, tmp_path: Path):
    packer(results, tmp_path / "out").close()

    assert unpack(tmp_path / "out", tmp_path / "again") == ["bench", "costs"]
    restored = tmp_path / "again" / "bench" / "runs" / "a.1" / "run.json"
    assert restored.read_text() == "{}"


def test_a_folder_is_packed_anew_when_something_in_it_changed(results: Path, tmp_path: Path):
    out = tmp_path / "out"
    packs = packer(results, out)
    packs.poke()
    (results / "costs" / "yields.md").write_text("new")
    packs.close()

    with tarfile.open(out / "costs.tar.xz") as tar:
        assert "costs/yields.md" in tar.getnames()


def test_a_log_that_grows_is_packed_at_the_end(results: Path, tmp_path: Path):
    log = results / "bench" / "server.log"
    log.write_text("a line")
    packs = packer(results, tmp_path / "out")
    packs.poke()
    archive = tmp_path / "out" / "bench.tar.xz"
    until_s = time.monotonic() + 30
    while not archive.exists():
        assert time.monotonic() < until_s
    log.write_text("a line and another")
    packs.poke()
    packs.close()

    unpack(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "bench" / "server.log").read_text() == "a line and another"


def test_requests_that_the_runs_hold_are_not_packed_twice(results: Path, tmp_path: Path):
    for name in ("requests.jsonl", "runs/a.1/requests.jsonl"):
        (results / "bench" / name).write_text("{}")
    packer(results, tmp_path / "out").close()

    with tarfile.open(tmp_path / "out" / "bench.tar.xz") as tar:
        named = [name for name in tar.getnames() if name.endswith("requests.jsonl")]
    assert named == ["bench/runs/a.1/requests.jsonl"]


def test_what_is_too_large_leaves_the_rest_and_is_named(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(archive, "LIMIT_BYTES", 4000)
    (results / "costs" / "trace.bin").write_bytes(os.urandom(9000))
    packs = packer(results, tmp_path / "out")
    packs.close()

    assert packs.left_out == {"bench": [], "costs": ["trace.bin"]}
    assert (tmp_path / "out" / "costs.tar.xz").stat().st_size < 4000


def test_a_folder_without_archives_is_bad_input(tmp_path: Path):
    with pytest.raises(InputError, match="holds no"):
        unpack(tmp_path, tmp_path / "to")


def test_a_broken_archive_is_bad_input(tmp_path: Path):
    (tmp_path / "bench.tar.xz").write_bytes(b"not an archive")
    with pytest.raises(InputError, match=r"bench\.tar\.xz: cannot be unpacked"):
        unpack(tmp_path, tmp_path / "to")
