"""Quality against cost of the embedded model: guidance, guided interval, solvers and steps, judged from outside.

    latteflow data emoji
    latteflow train recipes/emoji-64/judge.yaml
    python benchmarks/frontier.py --out benchmarks/results/frontier.md

Every row draws the same held-out captions from the same noise. Nothing is timed: a row's cost is counted, in calls of
the network and in sequences (a guided call takes two).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pages import table

from latteflow import LatteFlowPipeline, __version__
from latteflow.evaluate.frontier import Point, Sampling, sampling_frontier
from latteflow.models.embedded import resolve_model

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
INTERVALS = ((0.0, 0.5), (0.0, 0.75), (0.1, 1.0), (0.25, 1.0), (0.1, 0.75))
STEPS = {"euler": (8, 12, 20, 28, 40, 80), "heun": (6, 10, 20), "dpm++": (8, 12, 20, 40), "unipc": (8, 12, 20, 40)}


def main() -> None:
    """Parse, measure, print the page, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-64")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--judge", type=Path, default=Path("runs/emoji-64/judge/final"))
    parser.add_argument("--drawings", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=4.0, help="where it is not what is varied")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    usual = Sampling(guidance_scale=options.guidance)
    parts = {
        "Guidance scale": [replace(usual, guidance_scale=scale) for scale in SCALES],
        "Guided interval": [replace(usual, guidance_interval=interval) for interval in INTERVALS],
        "Solver and steps": [replace(usual, solver=name, steps=n) for name, steps in STEPS.items() for n in steps],
    }
    pipe = LatteFlowPipeline.from_pretrained(options.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    real, points = sampling_frontier(
        pipe,
        Path(resolve_model(options.model)),
        options.data,
        options.judge,
        dict.fromkeys(sampling for part in parts.values() for sampling in part),  # each once, in order
        drawings=options.drawings,
        seed=options.seed,
        watch=lambda message: print(message, file=sys.stderr),
    )
    found = {point.sampling: point for point in points}
    text = page(options, real, {title: [found[sampling] for sampling in part] for title, part in parts.items()})
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def page(options: argparse.Namespace, real: dict[str, float], parts: dict[str, list[Point]]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"# Quality against cost of {options.model}",
        "",
        f"`python benchmarks/frontier.py --model {options.model} --drawings {options.drawings} --guidance "
        f"{options.guidance:g} --seed {options.seed}`",
        "",
        f"{time.strftime('%Y-%m-%d')}, latteflow {__version__}, torch {torch.__version__}, CPU, float32. "
        f"{options.drawings} held-out captions, one drawing each; the same noise in every row. The judge's top-1, "
        "top-5 and style, and the Fréchet and kernel distances of EfficientNet-Lite0's features along 64 directions to "
        "as many real training pictures (docs of `latteflow evaluate`). A step is an interval of time; a guided call "
        "of the network takes two sequences. One seed: two rows a few percent apart may be alike.",
        "",
        f"Real pictures of the same pairs: {', '.join(figures(real))} (concept, top 5, style, Fréchet, kernel).",
    ]
    header = ("solver", "steps", "guidance", "guided t", "calls", "sequences")
    for title, points in parts.items():
        rows = [[*conditions(point), *figures(point.figures)] for point in points]
        header_of_figures = ("concept", "top 5", "style", "Fréchet", "kernel")
        lines += ["", f"## {title}", "", *table((*header, *header_of_figures), rows)]
    return "\n".join(lines) + "\n"


def conditions(point: Point) -> Sequence[str]:
    """Return how a row was drawn, and what it costs."""
    sampling = point.sampling
    first, last = sampling.guidance_interval
    guided = "none" if sampling.guidance_scale == 1 else f"{first:g} to {last:g}"
    drawn = (sampling.solver, str(sampling.steps), f"{sampling.guidance_scale:g}", guided)
    return [*drawn, str(point.calls), str(point.sequences)]


def figures(values: dict[str, float]) -> Sequence[str]:
    """Return a row's figures."""
    shares = [f"{100 * values[key]:.1f}%" for key in ("concept", "concept_top5", "style")]
    return [*shares, f"{values['frechet']:.1f}", f"{values['kernel']:.2f}"]


if __name__ == "__main__":
    main()
