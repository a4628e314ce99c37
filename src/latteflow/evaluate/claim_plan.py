"""Plans of trials: one base recipe, arms that change a thing of it, seeds, and the claims that compare two arms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator
from yaml import YAMLError, safe_load

from latteflow.errors import UserError
from latteflow.evaluate.trial_feed import Wording
from latteflow.evaluate.trials import Weights
from latteflow.train.recipe import GeneratorRecipe, Section, load_recipe


class Arm(Section):
    """One way to train."""

    label: str
    overrides: tuple[str, ...] = ()
    """``key=value`` on the base recipe."""
    weights: Weights = "backbone"
    seeds: tuple[NonNegativeInt, ...] | None = None
    """Left out, the plan's."""
    flops_of: str | None = None
    """Train for as many operations as this arm, in place of as many steps."""


class Claim(Section):
    """One arm is better than another."""

    line: Literal["a", "b", "c", "d", "e", "f", "g"]
    """The question it belongs to (docs/claims.md)."""
    says: str
    better: str
    than: str
    paper: bool = True
    """Whether the paper says so; else it is a default of this project."""


class Drawings(Section):
    """What is drawn at the end of a run."""

    number: Annotated[int, Field(ge=1)] = 256
    """Held-out prompts, spread evenly."""
    steps: PositiveInt = 24
    guidance_scale: float = 3.0
    real: PositiveInt = 1024
    """Training pictures that the Fréchet distance's directions are taken from."""


class Plan(Section):
    """All of one case."""

    case: str
    title: str
    base: str
    """The base recipe; the path starts at the plan's folder."""
    wording: Wording = "captions"
    heldout: PositiveInt = 1024
    """Held-out pictures that the loss is read on, spread evenly."""
    judge: str
    """Folder of what looks at drawings: of `latteflow train .../judge.yaml`, or of `benchmarks/fashion_mnist.py`."""
    judge_figure: str
    """The judge's figure that is compared beside loss and distance."""
    drawings: Drawings = Drawings()
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    margin: NonNegativeFloat = 0.005
    """The smallest advantage that would matter, as a share of the base arm's mean figure."""
    arms: dict[str, Arm]
    """By name; the first is the base. They are run in this order."""
    claims: tuple[Claim, ...]

    @model_validator(mode="after")
    def _names_are_known(self) -> Plan:
        wanted = [name for claim in self.claims for name in (claim.better, claim.than)]
        wanted += [arm.flops_of for arm in self.arms.values() if arm.flops_of is not None]
        for name in wanted:
            if name not in self.arms:
                raise ValueError(f"no arm {name!r}; there is {', '.join(self.arms)}")
        return self

    @property
    def base_arm(self) -> str:
        """The arm that seeds are measured on first."""
        return next(iter(self.arms))

    def trials(self) -> Iterator[tuple[str, int]]:
        """Yield arm and seed of every run, in order."""
        for name, arm in self.arms.items():
            for seed in self.seeds if arm.seeds is None else arm.seeds:
                yield name, seed


def load_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: no such file, not YAML, an unknown key, or an arm that is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no plan {path}: give the path of a YAML file such as benchmarks/plans/emoji-64.yaml")
    try:
        plan = Plan.model_validate(safe_load(path.read_text(encoding="utf-8")))
    except YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where or 'the plan'}: {first['msg']}") from error
    return plan.model_copy(update={"base": str(path.parent / plan.base)})


def recipe_of(
    plan: Plan, arm: str, seed: int, output: Path, more: tuple[str, ...] = (), steps: int | None = None
) -> GeneratorRecipe:
    """Return the recipe of one run.

    Args:
        plan: the plan.
        arm: its name.
        seed: the run's.
        output: the run's own folder.
        more: ``key=value`` for all arms, before the arm's own.
        steps: in place of the recipe's.

    Raises:
        UserError: the base is no generator's recipe, or an override does not fit.
    """
    own = [f"train.seed={seed}", f"output={output}"] + ([] if steps is None else [f"train.steps={steps}"])
    recipe = load_recipe(plan.base, [*more, *plan.arms[arm].overrides, *own])
    if not isinstance(recipe, GeneratorRecipe) or recipe.data.kind != "captioned":
        raise UserError(f"{plan.base}: trials are of the generator stage, on data.kind=captioned")
    return recipe
