"""How long a fresh process takes: to import the package, and to a picture on disk."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from latteflow.benchmark.measure import Timing
from latteflow.benchmark.report import Page, Settings, seconds, spread, table
from latteflow.errors import UserError

ROUNDS = 7
_LIBRARIES = "import torch, diffusers, transformers"
_OPTIONAL = ("accelerate", "peft", "torchao")
_CLASSES = (
    f"{_LIBRARIES}; from diffusers import AutoencoderDC, DiffusionPipeline, FlowMatchEulerDiscreteScheduler; "
    "from transformers import DynamicCache, PreTrainedModel, Qwen2VLForConditionalGeneration"
)


def run_once(command: Sequence[str]) -> float:
    """Return the seconds of a command in a process of its own.

    Raises:
        UserError: it failed.
    """
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])} failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
    return taken


def startup_page(settings: Settings, watch: Callable[[str], object]) -> Page:
    """Time fresh processes in turns.

    Args:
        settings: as elsewhere; processes use all cores, as a user's would.
        watch: told what is being done.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "picture.png")
        commands = {
            "python alone": [sys.executable, "-c", "pass"],
            "import latteflow": [sys.executable, "-c", "import latteflow"],
            "latteflow --version": [sys.executable, "-m", "latteflow", "--version"],
            "import torch, diffusers, transformers": [sys.executable, "-c", _LIBRARIES],
            "the same, and the classes that a picture takes": [sys.executable, "-c", _CLASSES],
            "latteflow generate, to a PNG": [
                *[sys.executable, "-m", "latteflow", "generate", "a red apple, noto style"],
                *["--steps", str(settings.steps), "--out", picture],
            ],
        }
        watch(f"{len(commands)} fresh processes take turns")
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(1 + settings.rounds(ROUNDS)):
            for name, command in commands.items():
                value = run_once(command)
                if number:  # the first reads files from the disk
                    taken[name].append(value)
    timings = {name: Timing(tuple(values)) for name, values in taken.items()}
    alone, package, _, libraries, classes, drawn = (timing.median for timing in timings.values())
    rows = [(f"`{name}`", seconds(timing.median), spread(timing)) for name, timing in timings.items()]
    beyond = [
        ("`import latteflow` beyond python", seconds(max(package - alone, 0.0))),
        ("fresh process to PNG beyond `import torch, diffusers, transformers`", seconds(drawn - libraries)),
        ("the same beyond their classes that a picture takes", seconds(drawn - classes)),
    ]
    made = (
        f"Wall time of fresh processes, {settings.rounds(ROUNDS)} rounds in turns after one that does not count (files "
        f"then come from memory); the picture is emoji-64's, {settings.steps} steps with guidance. diffusers and "
        "transformers import their models late, so that `import diffusers` alone is less than any picture needs; both "
        f"are shown. diffusers also imports, where it finds them: {_found(_OPTIONAL)}."
    )
    body = table(("process", "s", "10% to 90% (times)"), rows) + "\n\n" + table(("difference of medians", "s"), beyond)
    return Page("startup", "From nothing to a picture", made, body, torch.float32)


def _found(packages: Sequence[str]) -> str:
    """Return versions, for a process that finds more takes longer to start."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} (not installed)")
    return ", ".join(found)
