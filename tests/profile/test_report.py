"""What a person sees of a profile."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from conserve_sgl.profile.report import plot_profile, print_check, print_profile
from support.profiles import steps


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=120)


def test_a_profile_shows_what_it_is_of_what_steps_cost_and_how_sure_it_is(console, profile):
    print_profile(console, profile, Path("there/profile.json"))
    text = console.export_text()
    assert "there/profile.json" in text
    for part in ("some/Model-1B", "NVIDIA H100", "bfloat16", "2026-11-24 21:00"):
        assert part in text
    lines = text.splitlines()
    token = next(line for line in lines if line.startswith("│ token "))
    assert "0.03" in token
    *_, mixed = (line for line in lines if line.startswith("│ mixed "))  # the table of errors
    assert mixed.split("│")[2].strip() == "0"


def test_a_check_shows_both_ways_of_predicting(console, profile):
    print_check(console, profile, steps(slower=1.5))
    text = console.export_text()
    assert "By the profile alone" in text
    assert "Refitted as it goes" in text
    assert "+50.0%" in text


def test_the_picture_is_a_png(profile, tmp_path):
    path = tmp_path / "picture.png"
    plot_profile(profile, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
