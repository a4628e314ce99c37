"""``latteflow info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from latteflow.cli.model import DEFAULT_MODEL, ModelOption, load_pipeline
from latteflow.errors import UserError


def info(
    model: ModelOption = DEFAULT_MODEL,
    steps: Annotated[int, typer.Option(help="Calls of the network a picture.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model is and what it costs: parameters, operations, memory."""
    if not 1 <= steps <= 1000:
        raise UserError(f"--steps has to be 1 to 1000: got {steps}")
    pipe = load_pipeline(model)
    from latteflow.evaluate.cost import cost_of

    cost = cost_of(pipe, steps=steps)
    config = pipe.transformer.config
    side = config.sample_size * pipe.vae.spatial_compression_ratio
    if as_json:
        print(json.dumps({"model": model, "picture_size": side, **cost.as_dict()}, indent=2))
        return
    rows = {
        "picture": f"{side}x{side}, {cost.image_tokens} tokens",
        "experts": f"{cost.groups} groups of {cost.layers_per_step} layers, edges "
        + ", ".join(f"{edge:g}" for edge in pipe.transformer.intervals.edges),
        "residual attention": config.residual_attention,
        "parameters": f"{_short(cost.total_parameters)}: "
        + ", ".join(f"{name} {_short(number)}" for name, number in cost.parameters.items()),
        "frozen / trainable": f"{_short(cost.frozen_parameters)} / {_short(cost.trainable_parameters)}",
        "active a step": f"{_short(cost.active_parameters)} of the replica's {_short(cost.trainable_parameters)}",
        "operations a step": f"{_short(cost.flops_per_step)}FLOP (guided, prompt of {cost.prompt_tokens} tokens)",
        "operations an image": f"{_short(cost.flops_per_image)}FLOP ({steps} steps, prefill and decoder included)",
        "context a prompt": f"{_short(cost.context_bytes)}B",
        "weights in memory": f"{_short(cost.weight_bytes)}B ({str(pipe.transformer.dtype).removeprefix('torch.')})",
    }
    print(model)
    for name, value in rows.items():
        print(f"  {name:<20} {value}")


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"
