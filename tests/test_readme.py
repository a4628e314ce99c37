"""Every command of the README runs, in the README's order, in an empty folder.

Training runs under the recipes' `smoke` override, on a data set that `latteflow data emoji` builds from fake packages.
`make` targets start from nothing and run these very tests, so only their recipes are resolved (`make -n`).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "data"))
import emoji_packages

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line
]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
# The fake set has none of the groups that the recipes leave out; npm is not asked for what is in the cache.
TRAINING = ("smoke=true", "data.leave_out_groups=[]", "train.cpu_threads=1")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """An empty folder to work in, with an npm cache of fake packages and the recipes beside it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "cache" / "latteflow" / "npm").mkdir(parents=True)
    emoji_packages.pack_all(folder / "cache" / "latteflow" / "npm")
    (folder / "desk").mkdir()
    return folder / "desk"


def _run(arguments, desk):
    environment = {**os.environ, "XDG_CACHE_HOME": str(desk.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        arguments, cwd=desk, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{arguments}: {result.stderr[-2000:]}"
    return result.stdout


def _translated(command):
    words = [str(ROOT / word) if word.startswith("recipes/") else word for word in shlex.split(command)]
    if words[:2] == ["latteflow", "train"] and "--dry-run" not in words:
        words += TRAINING
    return [sys.executable, "-m", "latteflow", *words[1:]]


def test_the_readme_shows_every_verb_that_a_newcomer_needs():
    verbs = {command.split()[1] for command in COMMANDS if command.startswith("latteflow")}
    assert {"generate", "ask", "info", "data", "train"} <= verbs
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert len(PYTHON) == 2


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_targets_resolve(command):
    result = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_latteflow_command_runs(desk):
    commands = [command for command in COMMANDS if not command.startswith("make")]
    assert all(command.startswith("latteflow ") for command in commands)
    for command in commands:
        _run(_translated(command), desk)
    assert (desk / "grid.png").is_file()
    assert (desk / "runs/smoke/generator/final/model_index.json").is_file()


def test_the_python_examples_run_one_after_the_other(desk):
    answer = _run([sys.executable, "-c", "\n".join(PYTHON)], desk)
    assert answer.count("\n") == 2
