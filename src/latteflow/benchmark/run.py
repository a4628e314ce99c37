"""The benchmarks by name, and the folder of results that they write."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from latteflow.benchmark.curves import curves_page
from latteflow.benchmark.emoji import emoji_page
from latteflow.benchmark.limits import limits_page
from latteflow.benchmark.paper import check_preset, paper_page
from latteflow.benchmark.plots import plot_curves, require_matplotlib
from latteflow.benchmark.report import Page, Settings, conditions, readme
from latteflow.benchmark.startup import startup_page
from latteflow.errors import UserError

NAMES = ("limits", "startup", "emoji", "paper", "curves")
"""In the order they are run."""


def chosen_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return what was asked for in the order it is run; nothing asks for everything.

    Raises:
        UserError: there is no such benchmark.
    """
    asked = set(names)
    if unknown := sorted(asked - set(NAMES)):
        raise UserError(f"no benchmark {unknown[0]!r}: there are {', '.join(NAMES)}")
    return tuple(name for name in NAMES if not asked or name in asked)


def run_benchmarks(
    names: Iterable[str], settings: Settings, out: Path, *, plots: bool, watch: Callable[[str], object]
) -> list[Path]:
    """Measure, and write a page each and the README of them all.

    Args:
        names: of ``NAMES``; none stands for all.
        settings: of all of them.
        out: the folder of results.
        plots: whether curves are drawn as well.
        watch: told what is being done.

    Returns:
        The files written.

    Raises:
        UserError: no such benchmark, a preset that ``paper`` cannot cut, or matplotlib is wanted and not there.
    """
    chosen = chosen_names(names)
    if "paper" in chosen:
        check_preset(settings.preset)
    if plots and "curves" in chosen:
        require_matplotlib()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in chosen:
        load, began = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"), time.perf_counter()
        watch(name)
        page = _measure(name, settings, out, plots=plots, watch=watch)
        file = out / f"{name}.md"
        text = page.text(settings, load=load, seconds=time.perf_counter() - began)
        file.write_text(text, encoding="utf-8")
        written.append(file)
    (out / "README.md").write_text(readme(_pages(out)), encoding="utf-8")
    return [*written, out / "README.md"]


def _measure(name: str, settings: Settings, out: Path, *, plots: bool, watch: Callable[[str], object]) -> Page:
    match name:
        case "limits":
            return limits_page(settings)
        case "startup":
            return startup_page(settings, watch)
        case "emoji":
            return emoji_page(settings, watch)
        case "paper":
            return paper_page(settings, watch)
    page, curves = curves_page(settings, watch)
    if plots:
        note = f"{settings.preset} geometry, random weights, {settings.dtype_name}; {conditions(settings)}"
        plot_curves(curves, out / "curves.png", note)
    return page


def _pages(out: Path) -> list[tuple[str, str, str]]:
    """Return name, title and making of the pages in a folder, those of earlier runs too."""
    found = []
    for name in NAMES:
        file = out / f"{name}.md"
        if file.is_file():
            parts = [part for part in file.read_text(encoding="utf-8").split("\n\n") if not part.startswith("**Made")]
            found.append((name, re.sub(r"^# ", "", parts[0]), parts[3]))
    return found
