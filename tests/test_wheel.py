"""The wheel, installed beside SGLang into a clean environment, works from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Nothing of the checkout may help.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out)
    done = _run(*build, cwd=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_package_and_its_entry_points(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = [name for name in names if name.endswith("entry_points.txt")]
        text = archive.read(points).decode()
    assert "conserve_sgl/plugin.py" in names
    assert "conserve_sgl/device/shipped/h100-llama8b-triton.json" in names
    page = {"index.html", "page.css", "page.js", "icon.svg"}
    page |= {"uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"}
    assert {f"conserve_sgl/ingress/page/{name}" for name in page} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "scripts"))]
    assert "conserve = conserve_sgl.plugin:register" in text
    assert "conserve_cpu = conserve_sgl.platform:activate" in text


@pytest.mark.engine
@pytest.mark.usefixtures("no_other_server")
def test_it_works_from_a_clean_environment(wheel: Path, checkout: Path, tmp_path: Path):
    uv = shutil.which("uv") or checkout / ".tools" / "bin" / "uv"
    home = tmp_path / "env"
    assert _run(uv, "venv", "--python", sys.executable, home, cwd=tmp_path).returncode == 0
    install = (uv, "pip", "install", "--python", home / "bin" / "python")
    lock = checkout / "requirements.lock"
    done = _run(*install, f"{wheel}[sglang]", "--constraint", lock, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    conserve = home / "bin" / "conserve"
    assert _run(conserve, "--version", cwd=tmp_path).stdout.startswith("conserve-sgl ")
    doctor = _run(conserve, "doctor", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "conserve would be in every process" in doctor.stdout
    missing = _run(conserve, "eval", "no.yaml", cwd=tmp_path)
    assert missing.returncode == 2
    assert "no.yaml" in missing.stderr
