from __future__ import annotations

from conserve_sgl.client.faults import MAX_KINDS, Faults


def test_kinds_are_counted_whatever_numbers_are_in_them():
    faults = Faults()
    for tokens in (2000, 3000, 4000):
        faults.add(f"a.jsonl:{tokens}", 400, f"{tokens} tokens are\n more than 1024")
    faults.add("a.jsonl:7", None, "connection lost")
    assert list(faults.lines()) == [
        "3 x 400 2000 tokens are more than 1024 (a.jsonl:2000)",
        "1 x connection lost (a.jsonl:7)",
    ]
    assert faults.total == 4


def test_rare_kinds_are_one_line():
    faults = Faults()
    for i in range(3 * MAX_KINDS):
        faults.add("x", 500, "a" * i)
    *_, last = faults.lines()
    assert last == f"{MAX_KINDS - 4} x other reasons"
    assert sum(int(line.split(" ")[0]) for line in faults.lines()) == 3 * MAX_KINDS
