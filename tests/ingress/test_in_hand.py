"""Counts that several processes share: each has a line that goes with it, however it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conserve_sgl.errors import ServerError
from conserve_sgl.ingress import in_hand
from conserve_sgl.ingress.in_hand import InHand, in_hand_file

_OTHER = """
import sys
from pathlib import Path
from conserve_sgl.ingress.in_hand import InHand

in_hand = InHand()
in_hand.share(Path(sys.argv[1]))
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Other:
    """Another process that shares the counts, and does what it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def does(self, what: str) -> str:
        """The value of the expression `what`, over there, of its `in_hand`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"in_hand.{what}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextmanager
def another(path: Path) -> Iterator[Other]:
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", _OTHER, str(path)]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Other(process)
        finally:
            process.kill()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "in-hand"


def test_alone_it_counts_for_itself():
    mine, others = InHand(), InHand()
    mine.begin()
    mine.begin()
    mine.end()
    assert (mine.now(), others.now()) == (1, 0)


def test_what_begins_after_a_mark_counts_from_the_first_look_on():
    in_hand = InHand()
    in_hand.begin()
    assert in_hand.begun_since(1) == 0
    in_hand.begin()
    in_hand.end()
    in_hand.begin()
    assert in_hand.begun_since(1) == 2
    assert in_hand.begun_since(2) == 0


def test_an_older_mark_forgets_nothing():
    # Of two processes one may have read the latest message before the other.
    in_hand = InHand()
    in_hand.begun_since(2)
    in_hand.begin()
    assert in_hand.begun_since(1) == 1
    assert in_hand.begun_since(2) == 1


def test_two_processes_count_together(path):
    mine = InHand()
    mine.share(path)
    with another(path) as other:
        other.does("begun_since(7)")
        other.does("begin()")
        mine.begin()
        assert mine.now() == 2
        assert other.does("now()") == "2"
        # The other one looked first: what went since then is known here, too.
        assert mine.begun_since(7) == 2
        mine.end()
        assert other.does("now()") == "1"


def test_a_process_that_dies_leaves_its_line_to_the_next(path):
    mine = InHand()
    mine.share(path)
    with another(path) as first:
        first.does("begun_since(7)")
        first.does("begin()")
    assert mine.now() == 1
    with another(path) as second:
        assert second.does("now()") == "0"
        assert mine.now() == 0
        # What went to the engine has gone there, whoever brought it.
        assert mine.begun_since(7) == 1


def test_more_processes_than_lines(path, monkeypatch):
    with another(path) as other:
        assert other.does("now()") == "0"
        monkeypatch.setattr(in_hand, "MOST_PROCESSES", 1)
        with pytest.raises(ServerError, match="more than 1 tokenizer workers"):
            InHand().share(path)


def test_a_file_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(ServerError, match=f"cannot share {tmp_path}/none/in-hand"):
        InHand().share(tmp_path / "none" / "in-hand")


def test_two_servers_of_a_machine_have_a_file_each():
    assert in_hand_file("a") != in_hand_file("b")
