"""What one evaluation leaves: its figures, each with what it depends on, and what it was run with.

``evaluation.json`` is written and read here; the report and the comparison of two know nothing but this.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

import latteflow
from latteflow.data.shards import write_json
from latteflow.errors import UserError
from latteflow.evaluate.numbers import Unit, shown_number

FILE = "evaluation.json"


class Figure(BaseModel):
    """One number, and what it depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: str
    """Such as ``fidelity``."""
    of: str
    """What was looked at, such as ``guided`` or ``without guidance``."""
    name: str
    """Such as ``FID``."""
    value: float | None
    """None where there is none; ``why`` says why."""
    lowest: float | None = None
    """Over the seeds, whose mean is ``value``; of an Inception score, one deviation of its splits below it."""
    highest: float | None = None
    unit: Unit = ""
    why: str = ""
    conditions: dict[str, Any] = {}
    """What has to agree for two such figures to be compared, and ``model``, ``device``, ``seeds``."""

    @property
    def number(self) -> str:
        """The value in words."""
        return "none" if self.value is None else shown_number(self.value, self.unit)

    @property
    def spread(self) -> str:
        """From the lowest to the highest in words; empty where they are one."""
        if self.lowest is None or self.highest is None or self.lowest == self.highest:
            return ""
        return f"{shown_number(self.lowest, self.unit)} to {shown_number(self.highest, self.unit)}"

    @property
    def shown(self) -> str:
        """Number and spread."""
        return f"{self.number} ({self.spread})" if self.spread else self.number

    @property
    def told(self) -> str:
        """Number and spread, or why there is none."""
        return f"{self.shown}: {self.why}" if self.why else self.shown


class Evaluation(BaseModel):
    """One run of ``latteflow evaluate``: plain JSON values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["latteflow evaluation 1"] = "latteflow evaluation 1"
    model: str
    date: str
    """When it began, UTC, ISO 8601."""
    seconds: dict[str, float]
    """By measure."""
    environment: dict[str, Any]
    """Versions, hardware, commit, and the weights' hash."""
    config: dict[str, Any]
    """The recipe, every default written out."""
    figures: tuple[Figure, ...]
    results: dict[str, Any]
    """What each measure said, whole."""

    def write(self, folder: Path) -> Path:
        """Write ``evaluation.json`` and return it: whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, finite(self.model_dump()))
        return folder / FILE


def read_evaluation(file: Path) -> Evaluation:
    """Return what an ``evaluation.json`` holds.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give the {FILE} of an output folder") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: give the {FILE} of an output folder") from error
    try:
        return Evaluation.model_validate(values)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "its top level"
        raise UserError(
            f"{file} is no {FILE} of this version ({where}: {error.errors()[0]['msg']}): give what "
            "`latteflow evaluate` wrote into its output folder"
        ) from error


def finite(values: Any) -> Any:
    """Return plain values for JSON: numbers that are none (such as 0 / 0) are None, tuples are lists."""
    if isinstance(values, Mapping):
        return {str(key): finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def environment_of(device: torch.device) -> dict[str, Any]:
    """Return versions, hardware and the state of the code.

    Args:
        device: that the model is on.
    """
    return {
        "latteflow": latteflow.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "diffusers")},
        "system": platform.platform(terse=True),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        **_checkout(Path(latteflow.__file__).resolve().parents[2]),
    }


def processor_name() -> str:
    """Return the processor's own name where the system tells it."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", file.read_text()) if file.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _checkout(folder: Path) -> dict[str, Any]:
    """Return the commit of a checkout, and whether its files were changed since; None where there is no checkout."""
    nothing = {"commit": None, "changed_since": None}
    if not (folder / ".git").exists() or not (folder / "pyproject.toml").is_file():
        return nothing
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or does not trust the folder
        return nothing
    return {"commit": commit.strip(), "changed_since": bool(changes.strip())}
