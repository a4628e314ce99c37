"""The scorers of GenEval and DPG, called where the user has them: nothing of theirs is part of this package.

Both need a GPU and an environment of their own (mmdet and open_clip; modelscope): the user names its interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latteflow.errors import UserError


def score_geneval(
    pictures: Path, checkout: Path, detector: Path, results: Path, *, python: str | Path = "python"
) -> dict[str, Any]:
    """Run GenEval's scorer and return its scores.

    Args:
        pictures: the folder that ``draw_geneval`` wrote.
        checkout: of the repository djghosh13/geneval.
        detector: the folder with the object detector that its ``download_models.sh`` fetched.
        results: file for the scorer's verdicts, one picture a line.
        python: the interpreter of an environment that has what its README names.

    Returns:
        ``images``; the shares of right ``tasks`` by tag; ``overall``, their mean; ``prompts``, the share with at least
        one right picture. As its own ``summary_scores.py`` reckons them.

    Raises:
        UserError: the scorer is not there, or it failed.
    """
    script = checkout / "evaluation" / "evaluate_images.py"
    _require(script, "GenEval's scorer", "https://github.com/djghosh13/geneval")
    if not detector.is_dir():
        raise UserError(f"no folder {detector}: give the one that GenEval's evaluation/download_models.sh filled")
    number = len(list(pictures.glob("[0-9]*/samples/*.png")))
    if not number:
        raise UserError(f"no pictures in {pictures}: draw them first")
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    _run(
        [python, script.name, pictures.resolve(), "--outfile", results.resolve(), "--model-path", detector.resolve()],
        script.parent,
        "GenEval's scorer",
    )
    return geneval_summary(results, number)


def geneval_summary(results: Path, pictures: int) -> dict[str, Any]:
    """Return the scores in a file of GenEval's verdicts.

    Args:
        results: the file, one JSON object a line.
        pictures: how many verdicts there have to be.

    Raises:
        UserError: there are others, or none.
    """
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    verdicts = [json.loads(line) for line in lines if line.strip()]
    if len(verdicts) != pictures or not verdicts:
        raise UserError(f"GenEval's scorer judged {len(verdicts)} of {pictures} pictures: see what it printed")
    tasks: dict[str, list[bool]] = defaultdict(list)
    prompts: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        tasks[verdict["tag"]].append(bool(verdict["correct"]))
        prompts[verdict["metadata"]].append(bool(verdict["correct"]))
    shares = {tag: sum(right) / len(right) for tag, right in tasks.items()}
    return {
        "images": len(verdicts),
        "tasks": shares,
        "overall": sum(shares.values()) / len(shares),
        "prompts": sum(any(right) for right in prompts.values()) / len(prompts),
    }


def score_dpg(pictures: Path, checkout: Path, results: Path, *, python: str | Path = "python") -> dict[str, Any]:
    """Run DPG's scorer and return its scores.

    Args:
        pictures: the folder that ``draw_dpg`` wrote.
        checkout: of the repository TencentQQGYLab/ELLA.
        results: ``.txt`` file for the scorer's verdicts, outside of ``pictures``.
        python: the interpreter of an environment that has what its README names.

    Returns:
        ``overall``, the DPG score in percent, and the mean of each of its ``categories`` of the first level.

    Raises:
        UserError: the scorer is not there, it failed, or it left out pictures.
    """
    script = checkout / "dpg_bench" / "compute_dpg_bench.py"
    _require(script, "DPG's scorer", "https://github.com/TencentQQGYLab/ELLA")
    side = _side_of_grids(pictures)
    results = results.with_suffix(".txt")
    results.parent.mkdir(parents=True, exist_ok=True)
    if results.resolve().parent == pictures.resolve():
        raise UserError(f"{results} lies among the pictures, and the scorer would take it for one: name another place")
    options = {
        "--image-root-path": pictures.resolve(),
        "--resolution": side,
        "--pic-num": 4,
        "--csv": script.with_name("dpg_bench.csv").resolve(),
        "--res-path": results.resolve(),
        "--vqa-model": "mplug",
    }
    said = _run([python, script, *(word for pair in options.items() for word in pair)], checkout, "DPG's scorer")
    return dpg_summary(said)


def dpg_summary(said: str) -> dict[str, Any]:
    """Return the scores in what DPG's scorer printed.

    Raises:
        UserError: it left out pictures, or printed no score.
    """
    failed = re.findall(r"^Failed filename: (\S+)", said, re.MULTILINE)
    if failed:
        raise UserError(
            f"DPG's scorer left out {len(failed)} pictures ({failed[0]} first): its score would be of others"
        )
    overall = re.search(r"^DPG-Bench score: (\S+)", said, re.MULTILINE)
    if overall is None:
        raise UserError("DPG's scorer printed no score: see what it printed")
    first_level = said.split("L1 category scores:")[-1].split("L2 category scores:")[0]
    categories = re.findall(r"^\s+([^:\n]+): (\S+)$", first_level, re.MULTILINE)
    return {"overall": float(overall[1]), "categories": {name: float(score) for name, score in categories}}


def _side_of_grids(folder: Path) -> int:
    """Return the side of one picture in a folder of grids, which have to be of one size and nothing else."""
    sizes = set()
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix != ".png":
            raise UserError(f"{file} is no picture, and DPG's scorer takes every file for one: move it away")
        with Image.open(file) as image:
            sizes.add(image.size)
    if not sizes:
        raise UserError(f"no pictures in {folder}: draw them first")
    if len(sizes) > 1 or len(set(next(iter(sizes)))) > 1:
        raise UserError(f"the pictures in {folder} are not squares of one size: {sorted(sizes)}")
    return next(iter(sizes))[0] // 2


def _require(script: Path, what: str, where: str) -> None:
    if not script.is_file():
        raise UserError(f"{what} is not there (no {script}): give the path of a checkout of {where}")


def _run(command: Sequence[Any], folder: Path, what: str) -> str:
    """Run a scorer and return what it printed.

    Raises:
        UserError: it cannot be started, or it failed.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{what} cannot be started with {words[0]}: {error.strerror}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"{what} failed ({last}): does {words[0]} have all that its README names?")
    return done.stdout
