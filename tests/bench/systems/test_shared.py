"""Which systems share a server, and how its files are divided among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conserve_sgl.bench.report.system import SystemConfig
from conserve_sgl.bench.systems.server import free_port
from conserve_sgl.bench.systems.shared import (
    SERVER_LOG,
    STEPS,
    ServerFiles,
    empty_caches,
    server_key,
    turn_dial,
)
from conserve_sgl.errors import ServerError


def conserve(name: str = "a", **section: Any) -> SystemConfig:
    return SystemConfig(name=name, kind="conserve", conserve=section)


def test_the_dial_alone_makes_no_other_server():
    one = conserve(slo={"tpot": "25ms"}, memory={"online_reserve": 0.1})
    other = conserve("b", memory={"online_reserve": 0.1}, slo={"ttft": "2x", "yield_ms": 3.0})
    assert server_key(one) == server_key(other)


@pytest.mark.parametrize(
    "other",
    [
        conserve(slo={"tpot": "25ms"}, memory={"online_reserve": 0.2}),
        conserve(slo={"tpot": "25ms", "a_key_that_no_dial_turns": 1}),
        SystemConfig(name="a", kind="stock"),
        SystemConfig(name="a", kind="conserve", flags=("--dtype=float32",)),
        SystemConfig(name="a", kind="conserve", env={"A": "1"}),
    ],
    ids=["another section", "another objective", "stock", "flags", "environment"],
)
def test_all_else_does(other: SystemConfig):
    assert server_key(conserve(slo={"tpot": "25ms"})) != server_key(other)


def write(folder: Path, text: str) -> None:
    for name in (SERVER_LOG, STEPS):
        with (folder / name).open("a") as file:
            file.write(text)


def test_each_system_keeps_what_was_written_in_its_own_time(tmp_path: Path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    files = ServerFiles(folders[0])
    for folder, text in zip(folders, ("one", "two", "three"), strict=True):
        write(folders[0], text)
        files.share(folder)
    write(folders[0], "the end")
    files.close()
    for name in (SERVER_LOG, STEPS):
        kept = [(folder / name).read_text() for folder in folders]
        assert kept == ["one", "two", "three"]


def test_a_system_alone_keeps_the_end_of_the_server_too(tmp_path: Path):
    files = ServerFiles(tmp_path)
    write(tmp_path, "one")
    files.share(tmp_path)
    write(tmp_path, ", stopped")
    files.close()
    assert (tmp_path / SERVER_LOG).read_text() == "one, stopped"


def test_a_server_that_writes_no_steps_leaves_none(tmp_path: Path):
    (tmp_path / "b").mkdir()
    files = ServerFiles(tmp_path)
    for folder in (tmp_path, tmp_path / "b"):
        files.share(folder)
    files.close()
    assert not list(tmp_path.rglob(STEPS))


def test_a_server_that_is_gone_is_said_to_be():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerError, match="did not empty its caches"):
        empty_caches(url)
    with pytest.raises(ServerError, match="set_internal_state"):
        turn_dial(url, {"slo": {"tpot": "25ms"}})
