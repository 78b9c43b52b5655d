"""What the doctor says of the host cache, a folder for batches and bytecode, without SGLang."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from conserve_sgl import doctor
from conserve_sgl.doctor import Level, host_cache
from conserve_sgl.emulation import DEVICE_ENV


def args(**changes) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "enable_hierarchical_cache": True,
            "hicache_write_policy": "write_through",
            "hicache_size": 0,
            "hicache_ratio": None,
            "mem_fraction_static": 0.5,
            "tp_size": 1,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "free_gib", "device_gib", "level", "said"),
    [
        ({"enable_hierarchical_cache": False}, 500, 80, Level.NOTE, "--enable-hierarchical-cache"),
        ({"hicache_write_policy": "write_back"}, 500, 80, Level.NOTE, "write_back copies too late"),
        ({}, 91, 80, Level.OK, "80 GiB of 81 GiB"),
        ({}, 89, 80, Level.NOTE, "lower --hicache-size"),
        ({"hicache_ratio": 4.0}, 91, 80, Level.NOTE, "160 GiB"),
        ({"tp_size": 2}, 91, 80, Level.NOTE, "160 GiB"),
        ({"hicache_size": 50}, 91, 80, Level.OK, "47 GiB of 81 GiB"),
        ({"hicache_size": 50}, 40, None, Level.NOTE, "47 GiB of 40 GiB"),
        ({"hicache_size": 50}, 5, 80, Level.NOTE, "of 0 GiB"),
        ({}, 40, None, Level.OK, "--hicache-ratio"),
    ],
)
def test_the_host_cache(changes, free_gib, device_gib, level, said):
    finding = host_cache(args(**changes), free_gib=free_gib, device_gib=device_gib)
    assert finding.level is level
    assert said in finding.detail


def test_an_emulated_device_is_not_taken_for_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(DEVICE_ENV, "h100-llama8b-triton")
    device = next(finding for finding in doctor._machine() if finding.what == "device")
    assert device.level is Level.NOTE
    assert "h100-llama8b-triton, emulated" in device.detail


@pytest.fixture
def report(tmp_path, monkeypatch):
    """The lines of a report of what is found without SGLang, and its exit code."""

    def report_of(config: str = "", *flags: str) -> tuple[str, int]:
        path = tmp_path / "conserve.yaml"
        path.write_text(config)
        console = Console(file=io.StringIO(), width=80)
        monkeypatch.setattr(doctor, "_hooks", lambda _config: [])
        monkeypatch.setattr(doctor, "_flags", lambda _flags, _config: [])
        monkeypatch.setattr(doctor, "_machine", list)
        code = doctor.examine(console, config=path, flags=flags)
        return console.file.getvalue(), code

    return report_of


def test_a_verdict_without_flags_speaks_of_conserve_alone(report):
    text, code = report()
    assert code == 0
    assert "conserve would be in every process of a server" in text
    assert "A server would start" not in text


def test_a_verdict_on_flags_speaks_of_a_server(report, tmp_path):
    assert "A server would start, with" in report("", "--model-path", str(tmp_path))[0]


@pytest.mark.parametrize("flags", [["--model-path", "{}"], ["--model-path={}"], ["--model={}"]])
def test_a_model_that_is_not_there_is_found_before_sglang_is_loaded(report, tmp_path, flags):
    missing = str(tmp_path / "none")
    text, code = report("", *(flag.format(missing) for flag in flags))
    assert code == 1
    assert f"bad  model          {missing}: no such file or folder" in text
    assert "would not start as configured: model" in text


def test_a_name_that_no_file_can_have_is_no_fault_of_the_doctors(report):
    assert "no such file or folder" in report("", "--model-path", "/" + "a" * 5000)[0]


def test_a_folder_for_batches_that_could_be_made_is_not_made(report, tmp_path):
    folder = tmp_path / "a" / "b"
    text, code = report(f"batch: {{storage_dir: {folder}}}")
    assert code == 0
    assert f"ok   batches        {folder}" in text
    assert not folder.parent.exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_for_batches_that_cannot_be_is_bad(report, tmp_path, name):
    (tmp_path / "file").write_text("")
    text, code = report(f"batch: {{storage_dir: {tmp_path / name}}}")
    assert code == 1
    assert f"{tmp_path / 'file'} is no folder that can be written" in text


def test_names_are_whole_on_a_narrow_terminal(report, tmp_path):
    name = "m" * 150
    assert f"{name}: no such file" in report("", "--model-path", str(tmp_path / name))[0]


@pytest.mark.parametrize(("is_set", "is_compiled"), [(True, False), (True, True), (False, False)])
def test_bytecode_that_is_made_anew_each_time_is_noted(report, monkeypatch, is_set, is_compiled):
    monkeypatch.setattr(sys, "dont_write_bytecode", is_set)
    monkeypatch.setattr(doctor, "_is_compiled", lambda _package: is_compiled)
    assert ("PYTHONDONTWRITEBYTECODE is set" in report()[0]) == (is_set and not is_compiled)
