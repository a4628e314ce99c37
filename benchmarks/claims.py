"""The paper's claims, tried at small scale: runs that differ in one thing, over seeds, and what can be told from them.

    python benchmarks/claims.py run benchmarks/plans/emoji-64.yaml benchmarks/plans/fashion-mnist.yaml --threads 1
    python benchmarks/claims.py report

`run` takes one run after the other: finished ones are skipped, interrupted ones go on. Start it a second time, beside
the first, for a second core: a run is taken by one process. `report` reads nothing but the saved JSON files.
docs/claims.md says what is compared and how.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import fashion_mnist
import torch
import transformers

from latteflow import LatteFlowPipeline, __version__
from latteflow.benchmark.report import processor_name
from latteflow.data.captioned import CaptionedImages
from latteflow.errors import UserError
from latteflow.evaluate.claim_plan import Plan, load_plan, recipe_of
from latteflow.evaluate.embedded import judged_shares, pixels_of
from latteflow.evaluate.fidelity import Fidelity
from latteflow.evaluate.trial_feed import TrialFeed, prompts_of
from latteflow.evaluate.trials import forget_checkpoints, run_trial, trial_flops
from latteflow.train.build import load_split
from latteflow.train.classifier import convolutional_features, load_classifier
from latteflow.train.guard import TrainingDiverged
from latteflow.train.loop import Progress, Stopped

RESULTS = Path("benchmarks/results/claims")
_AT_ONCE = 64


def main() -> None:
    """Parse and do; a mistake is told in a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="train what is not trained yet")
    runs.add_argument("plans", type=Path, nargs="+")
    runs.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="[CASE:]KEY=VALUE",
        help="on the base recipe of every plan or of one case, such as emoji-64:data.path=...",
    )
    runs.add_argument("--only", nargs="+", help="these arms alone")
    runs.add_argument("--threads", type=int, default=1)
    runs.add_argument("--work", type=Path, default=Path("runs/claims"), help="folder of checkpoints and weights")
    pages = verbs.add_parser("report", help="write the page and the plots")
    pages.add_argument("--readme", type=Path, help="a page with the markers claims: begin and claims: end")
    for verb in (runs, pages):
        verb.add_argument("--results", type=Path, default=RESULTS, help="folder of the saved runs")
    options = parser.parse_args()
    try:
        if options.verb == "run":
            run(options)
        else:
            from claims_report import write_report  # matplotlib is wanted here only

            write_report(options.results, options.readme)
    except UserError as error:
        sys.exit(f"claims: {error}")
    except Stopped as stop:
        print(stop, file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    """Take every run of every plan that no other process has taken or finished."""
    torch.set_num_threads(options.threads)
    plans = [load_plan(path) for path in options.plans]
    for arm in sorted(set(options.only or ()) - {arm for plan in plans for arm in plan.arms}):
        raise UserError(f"no arm {arm!r}; there is {', '.join(dict.fromkeys(arm for p in plans for arm in p.arms))}")
    for plan in plans:
        case = Case(plan, options)
        for arm, seed in plan.trials():
            file = options.results / plan.case / f"{arm}-{seed}.json"
            if file.is_file() or (options.only and arm not in options.only):
                continue
            with taken(options.work / plan.case / f"{arm}-{seed}.lock") as mine:
                if mine and not file.is_file():
                    tell(f"{plan.case} {arm} seed {seed}")
                    write_compact(file, case.result(arm, seed))


class Case:
    """A plan's data, judge and features: loaded with the first run that needs them, and kept for the others."""

    def __init__(self, plan: Plan, options: argparse.Namespace) -> None:
        self.plan, self.options = plan, options
        self.overrides = overrides_of(plan.case, options.overrides)
        self.work = options.work / plan.case
        self.recipe = recipe_of(plan, plan.base_arm, 0, self.work, self.overrides)

    @cached_property
    def images(self) -> tuple[CaptionedImages, CaptionedImages]:
        """Training and held-out pictures."""
        train, heldout = (load_split(self.recipe.data, split) for split in ("train", "heldout"))
        return train, heldout.spread(self.plan.heldout)

    @cached_property
    def feed(self) -> TrialFeed:
        """Latents and contexts."""
        captions = self.recipe.generator.captions_per_image
        return TrialFeed(*self.images, captions, self.plan.wording, self.work / "feed.safetensors")

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images[0].pixels.shape[-1]

    @cached_property
    def drawn(self) -> CaptionedImages:
        """The held-out pictures whose prompts are drawn."""
        return self.images[1].spread(self.plan.drawings.number)

    @cached_property
    def measures(self) -> Callable[[torch.Tensor], dict[str, float]]:
        """What is measured of drawings, uint8 (number, 3, height, width), one for each of ``drawn``."""
        looked = self._judge(Path(self.plan.judge))
        real = self.images[0].spread(self.plan.drawings.real).pixels
        fidelity = Fidelity(convolutional_features(pretrained=True), real, len(self.drawn))
        return lambda pixels: {**fidelity.of(pixels), **looked(pixels)}

    def _judge(self, folder: Path) -> Callable[[torch.Tensor], dict[str, float]]:
        if self.plan.wording == "classes":
            return partial(fashion_mnist.accuracy, fashion_mnist.load_judge(folder), self.drawn)
        return partial(judged_shares, load_classifier(folder, what="judge"), self.drawn)

    def result(self, arm: str, seed: int) -> dict[str, Any]:
        """Train and measure one run; what is written of it."""
        plan, chosen = self.plan, self.plan.arms[arm]
        output = self.work / f"{arm}-{seed}"
        recipe = recipe_of(plan, arm, seed, output, self.overrides)
        if chosen.flops_of is not None:
            other = recipe_of(plan, chosen.flops_of, seed, output, self.overrides)
            costs = [trial_flops(each, self.feed, size=self.size) for each in (other, recipe)]
            steps = round(other.train.steps * costs[0] / costs[1])
            recipe = recipe_of(plan, arm, seed, output, self.overrides, steps)
        about = {
            "case": plan.case,
            "arm": arm,
            "seed": seed,
            "weights": chosen.weights,
            "recipe": recipe.model_dump(mode="json", exclude={"encode"}),
            "made_with": conditions(recipe.train.cpu_threads or self.options.threads),
        }
        try:
            stage, figures = run_trial(recipe, self.feed, size=self.size, weights=chosen.weights, watch=progress)
        except TrainingDiverged as error:
            return {**about, "diverged": str(error)}
        began = time.process_time()
        self.write_case(stage.pipe)
        drawings = self.measures(pixels_of(self.draw(stage.pipe, seed)))
        spent = stage.other_seconds + time.process_time() - began
        forget_checkpoints(output)
        return {**about, **figures, "drawings": rounded(drawings), "processor_seconds_of_measuring": round(spent, 1)}

    def draw(self, pipe: LatteFlowPipeline, seed: int) -> list[Any]:
        """Draw each prompt once; the noise follows from seed and place alone."""
        prompts, settings = prompts_of(self.drawn, self.plan.wording), self.plan.drawings
        pictures: list[Any] = []
        for start in range(0, len(prompts), _AT_ONCE):
            pictures += pipe(
                prompts[start : start + _AT_ONCE],
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                generator=torch.Generator().manual_seed(seed * 1_000_000 + start),
            ).images
        return pictures

    def write_case(self, pipe: LatteFlowPipeline) -> None:
        """Write, once, the plan and what is measured of real pictures and of the same through the autoencoder."""
        file = self.options.results / self.plan.case / "case.json"
        plan = self.plan.model_dump(mode="json", exclude={"base"})
        if file.is_file():
            known = json.loads(file.read_text())
            if known["plan"] != plan:
                write_compact(file, {**known, "plan": plan})
            return
        parts = [self.drawn.batch(index) for index in torch.arange(len(self.drawn)).split(_AT_ONCE)]
        with torch.no_grad():
            through = torch.cat([pipe.vae(part).sample.float().clamp(-1, 1) for part in parts])
        error = ((through - torch.cat(parts)) / 2).square().mean(dim=(1, 2, 3))
        figures = Path(self.plan.judge) / "figures.json"
        write_compact(
            file,
            {
                "plan": plan,
                "pictures": {"train": len(self.images[0]), "heldout": len(self.images[1])},
                "real": rounded(self.measures(self.drawn.pixels)),
                "through_autoencoder": rounded(self.measures(((through + 1) * 127.5).round().to(torch.uint8))),
                "autoencoder_psnr_db": round(float((-10 * error.log10()).mean()), 2),
                "judge": json.loads(figures.read_text()) if figures.is_file() else None,
            },
        )


def overrides_of(case: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the ``key=value`` that concern a case: those without a case in front, and its own."""
    split = [(*override.partition(":"), override) for override in overrides]
    return tuple(
        whole if not colon or "=" in name else rest
        for name, colon, rest, whole in split
        if not colon or "=" in name or name == case
    )


@contextmanager
def taken(file: Path) -> Iterator[bool]:
    """Hold a run's lock for a while, if no other process does; the system lets go of it when a process ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def conditions(threads: int) -> dict[str, Any]:
    """Return versions, hardware and the state of the code."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "HEAD"),
        "changed_since": bool(
            git("status", "--porcelain", "--untracked-files=no", "src", "recipes", "benchmarks/*.py")
        ),
        "latteflow": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 1),
    }


def git(*words: str) -> str:
    """Return what git says, nothing outside of a repository."""
    folder = Path(__file__).parents[1]
    found = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def write_compact(file: Path, values: dict[str, Any]) -> None:
    """Write JSON with one line a key: small, and yet told apart by git."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(partial, file)


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """Return figures with five digits behind the point."""
    return {name: round(value, 5) for name, value in figures.items()}


def progress(seen: Progress) -> None:
    """Print a reading."""
    if "validation/loss" in seen.figures:
        tell(f"  step {seen.step} of {seen.steps}: held-out loss {seen.figures['validation/loss']:.4f}")


def tell(message: str) -> None:
    """Print with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
