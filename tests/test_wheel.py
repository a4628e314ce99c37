"""The wheel carries the embedded model and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_draws_and_answers_outside_the_checkout(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    installed, desk = tmp_path / "installed", tmp_path / "desk"
    desk.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert any(name.endswith("weights/emoji-64/transformer/diffusion_pytorch_model.safetensors") for name in names)
    assert not any(name.startswith(("tests/", "data/", "runs/")) for name in names)

    def run(*arguments: str) -> str:
        # The wheel's own folder comes before the checkout that this environment may have installed.
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=desk, env=environment, check=True, capture_output=True, text=True).stdout

    assert str(installed) in run("-c", "import latteflow; print(latteflow.__file__)")
    run("-m", "latteflow", "generate", "pizza, noto style", "--out", "pizza.png", "--steps", "8")
    assert run("-m", "latteflow", "ask", "pizza.png", "Which style is this?").strip()
