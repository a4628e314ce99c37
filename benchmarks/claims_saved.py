"""The saved runs of benchmarks/claims.py: a case's arms and seeds, their figures, and what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latteflow.errors import UserError
from latteflow.evaluate.claim_plan import Claim, Plan
from latteflow.evaluate.claims import FEWEST_SEEDS, Comparison, compare

Run = dict[str, Any]
LINES = {
    "a": "four experts against all layers at every step (Vanilla)",
    "b": "layers in a group",
    "c": "residual attention",
    "d": "the backbone's weights against random ones",
    "e": "uniform against uneven intervals",
    "f": "shared in/out layers against a group's own",
    "g": "experts that begin at noise",
}


@dataclass(frozen=True)
class Measure:
    """A figure of a run that arms are compared by."""

    name: str
    of: Callable[[Run], float]
    larger_is_better: bool = False


@dataclass(frozen=True)
class Case:
    """A plan and its saved runs, by arm and seed."""

    plan: Plan
    about: Run
    runs: dict[str, dict[int, Run]]
    diverged: tuple[str, ...]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The held-out loss, which verdicts are of, and what drawings are."""
        figure = self.plan.judge_figure
        return (
            Measure("held-out loss", lambda run: run["curve"][-1]["loss"]),
            Measure("FD-EffLite0", lambda run: run["drawings"]["frechet"]),
            Measure(f"judge: {figure}", lambda run: run["drawings"][figure], larger_is_better=True),
        )

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        """Return a figure by seed."""
        return {seed: measure.of(run) for seed, run in sorted(self.runs.get(arm, {}).items())}

    def compared(self, claim: Claim, measure: Measure) -> Comparison | None:
        """Return what the runs say of a claim; None while there are too few."""
        better, than = self.values(claim.better, measure), self.values(claim.than, measure)
        if len(set(better) & set(than)) < FEWEST_SEEDS:
            return None
        base = list(self.values(self.plan.base_arm, measure).values())
        margin = self.plan.margin * abs(sum(base) / len(base))
        return compare(better, than, margin=margin, larger_is_better=measure.larger_is_better)


def load_case(folder: Path) -> Case:
    """Read a case's runs.

    Raises:
        UserError: runs of one seed did not see the same samples and noise.
    """
    about = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    plan = Plan.model_validate({**about["plan"], "base": ""})
    runs: dict[str, dict[int, Run]] = {}
    diverged = []
    for file in sorted(folder.glob("*-*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        if "diverged" in run:
            diverged.append(f"{run['arm']} seed {run['seed']}: {run['diverged']}")
        elif run["arm"] in plan.arms:
            runs.setdefault(run["arm"], {})[run["seed"]] = run
    for seed in {seed for by_seed in runs.values() for seed in by_seed}:
        if len({by_seed[seed]["draws_sha256"] for by_seed in runs.values() if seed in by_seed}) > 1:
            raise UserError(f"{folder}: runs of seed {seed} did not see the same samples and noise")
    if plan.base_arm not in runs:
        raise UserError(f"{folder}: no run of {plan.base_arm!r}, which all others are measured by")
    ordered = {arm: runs[arm] for arm in plan.arms if arm in runs}
    return Case(plan, about, ordered, tuple(diverged))


def readings(case: Case, arm: str) -> list[list[dict[str, float]]]:
    """Return an arm's readings, those of all seeds at one step together; a step that a run lacks is left out."""
    curves = [{row["step"]: row for row in run["curve"]} for run in case.runs.get(arm, {}).values()]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [[curve[step] for curve in curves] for step in steps]
