"""``latteflow evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

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
    model: Annotated[str, typer.Argument(help="An embedded model's name or a trained model's folder.")] = DEFAULT_MODEL,
    data: Annotated[Path, typer.Option(help="The data set that `latteflow data emoji` wrote.")] = Path("data/emoji"),
    drawings: Annotated[int, typer.Option(help="Held-out prompts to draw.")] = 256,
    steps: Annotated[int, typer.Option(help="Calls of the network a picture.")] = 40,
    guidance: Annotated[float, typer.Option(help="Guidance scale of the drawings.")] = 4.0,
    seeds: Annotated[int, typer.Option(help="Sets of drawings.")] = 3,
    judge: Annotated[
        Path | None,
        typer.Option(help="Folder of the trained judge (default: runs/emoji-64/judge/final, if it exists)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    compiled: CompileOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Measure a model on held-out pictures: reconstruction, understanding, drawings."""
    if drawings < 1 or seeds < 1:
        raise UserError(f"--drawings and --seeds have to be 1 or more: got {drawings}, {seeds}")
    pipe = load_pipeline(model, device, dtype, quantize, compiled=compiled)
    from rich.console import Console

    from latteflow.evaluate.embedded import evaluate_embedded
    from latteflow.models.embedded import resolve_model

    console = Console(stderr=True)
    usual = Path("runs/emoji-64/judge/final")
    results = evaluate_embedded(
        pipe,
        Path(resolve_model(model)),
        data,
        drawings=drawings,
        steps=steps,
        guidance_scale=guidance,
        seeds=range(seeds),
        judge=judge or (usual if usual.is_dir() else None),
        watch=lambda message: console.print(message, highlight=False),
    )
    if as_json:
        print(json.dumps({"model": model, **results}, indent=2))
        return
    print(f"{model}: {', '.join(f'{key} {value}' for key, value in results['conditions'].items())}")
    print(f"  autoencoder            {results['autoencoder_psnr_db']:.2f} dB PSNR")
    for key, title in (
        ("most_common_answer", "most common answer"),
        ("understanding", "real pictures"),
        ("understanding_of_the_same_pairs", "  of the pairs drawn"),
    ):
        print(f"  {title:<22} {_row(results[key])}")
    spread = {
        name: f"{100 * value['mean']:.1f}% ({100 * value['lowest']:.1f} to {100 * value['highest']:.1f})"
        for name, value in results["drawn_then_asked"].items()
    }
    print(f"  {'drawn, then asked':<22} {', '.join(f'{name} {value}' for name, value in spread.items())}")
    for name in ("judge", "features"):
        if name in results:
            print(f"  {name + ', real pictures':<22} {_figures(results[name]['real'])}")
            print(f"  {name + ', drawings':<22} {_figures({k: v['mean'] for k, v in results[name]['drawn'].items()})}")
            print(f"  {'  by real':<22} {_figures(results[name]['drawn_by_real'])}")


def _figures(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _row(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}%" for name, value in shares.items())
