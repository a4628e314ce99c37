"""``latteflow evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from latteflow.cli.evaluated import print_comparison, print_embedded, print_figures
from latteflow.cli.model import (
    DEFAULT_MODEL,
    CompileOption,
    DeviceOption,
    DtypeOption,
    QuantizeOption,
    load_pipeline,
)
from latteflow.errors import UserError


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(
            help="An embedded model's name, a trained model's folder, or a recipe, such as "
            "recipes/evaluation/emoji-64.yaml (left out: emoji-64). With --cost: a preset."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value changes, such as sampling.steps=20; smoke=true for a recipe's short run."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="What `latteflow data emoji` wrote (data/emoji).")] = None,
    drawings: Annotated[int | None, typer.Option(help="Held-out prompts to draw (256).")] = None,
    steps: Annotated[int | None, typer.Option(help="Calls of the network a picture (40).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the drawings (4).")] = None,
    seeds: Annotated[int | None, typer.Option(help="Sets of drawings (3).")] = None,
    judge: Annotated[Path | None, typer.Option(help="The trained judge (runs/emoji-64/judge/final, if there).")] = None,
    inception: Annotated[Path | None, typer.Option(help="The FID Inception's weights, for fidelity.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report (the recipe's; runs/evaluation/MODEL).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cost: Annotated[bool, typer.Option("--cost", help="What presets cost, beside Vanilla; nothing is loaded.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two evaluation.json, side by side.", metavar="A.json B.json")
    ] = None,
    compiled: CompileOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Measure a model, write evaluation.json and a report; or compare two, or table the costs."""
    for name, number in (("--drawings", drawings), ("--seeds", seeds)):
        if number is not None and number < 1:
            raise UserError(f"{name} has to be 1 or more: got {number}")
    sampling = {"number": drawings, "steps": steps, "guidance_scale": guidance}
    network = {} if inception is None else {"kind": "inception", "weights": str(inception)}
    given = {
        "output": out,
        "data": {"path": data, "judge": judge},
        "sampling": {**sampling, "seeds": None if seeds is None else list(range(seeds))},
        "network": network,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "compile": compiled or None,
    }
    options = _given(given)
    if (cost or compare) and (options or (cost and compare)):
        raise UserError("--cost and --compare measure nothing: give one of them, and no other option but --json")
    words = [word for word in (target, *(overrides or [])) if word is not None]
    if compare is not None:
        if words:
            raise UserError(f"--compare takes two files and nothing else: leave {words[0]!r} out")
        _compare(*compare, as_json=as_json)
    elif cost:
        _cost(words, as_json=as_json)
    else:
        _run(target or DEFAULT_MODEL, overrides or [], options, as_json=as_json)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, paths as words."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        kept = _given(value) if isinstance(value, dict) else str(value) if isinstance(value, Path) else value
        if kept is not None and kept != {}:
            found[name] = kept
    return found


def _run(target: str, overrides: list[str], options: dict[str, Any], *, as_json: bool) -> None:
    from latteflow.evaluate.evaluation_recipe import is_recipe, load_evaluation

    recipe = load_evaluation(target, overrides, options)
    pipe = load_pipeline(recipe.model, recipe.device, recipe.dtype, recipe.quantize, compiled=recipe.compile)
    from rich.console import Console

    from latteflow.evaluate.inputs import require_inputs
    from latteflow.evaluate.measures import run_evaluation
    from latteflow.evaluate.record import finite
    from latteflow.evaluate.report_page import write_report

    console = Console(stderr=True)
    require_inputs(recipe)
    record, shown = run_evaluation(recipe, pipe, lambda message: console.print(message, highlight=False, markup=False))
    folder = Path(recipe.output)
    try:
        files = [record.write(folder), *write_report(record, shown, folder)]
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}") from error
    for file in files:
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
    if not is_recipe(target) and "embedded" in record.results:
        results = {"model": target, **record.results["embedded"]}
        print(json.dumps(finite(results), indent=2)) if as_json else print_embedded(results)
    elif as_json:
        print(json.dumps(finite(record.model_dump()), indent=2))
    else:
        print_figures(record)


def _compare(one: Path, other: Path, *, as_json: bool) -> None:
    from latteflow.evaluate.compare import compare
    from latteflow.evaluate.record import read_evaluation

    comparison = compare(read_evaluation(one), read_evaluation(other))
    if as_json:
        print(json.dumps(comparison.as_dict(), indent=2))
    else:
        print_comparison(comparison, str(one), str(other))


def _cost(presets: list[str], *, as_json: bool) -> None:
    from dataclasses import asdict

    from transformers.utils import logging as transformers_logging

    from latteflow.evaluate.cost_table import cost_page, cost_table

    transformers_logging.set_verbosity_error()
    rows = cost_table(presets or None)
    if as_json:
        print(json.dumps([{**asdict(row), "image_flops": row.image_flops} for row in rows], indent=2))
    else:
        print(cost_page(rows), end="")
