"""``latteflow info``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from latteflow.cli.model import DEFAULT_MODEL, DtypeOption, ModelOption, QuantizeOption, load_pipeline
from latteflow.errors import UserError
from latteflow.evaluate.numbers import short


def info(
    model: ModelOption = DEFAULT_MODEL,
    preset: Annotated[
        str | None, typer.Option(help="A real backbone's configuration in place of a model, or 'all' of them.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side, with --preset; left out, the preset's own.")] = None,
    steps: Annotated[int, typer.Option(help="Calls of the network a picture.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Say what a model is and what it costs: parameters, operations, memory.

    With --preset nothing is loaded and no weights are allocated, however large the model is.
    """
    if not 1 <= steps <= 1000:
        raise UserError(f"--steps has to be 1 to 1000: got {steps}")
    if preset is not None:
        if model != DEFAULT_MODEL:
            raise UserError(f"give --model {model} or --preset {preset}, not both")
        if dtype is not None or quantize is not None:
            raise UserError("--dtype and --quantize go with --model: a preset is reckoned in bfloat16")
        _print_presets(preset, size, steps, as_json=as_json)
        return
    if size is not None:
        raise UserError("--size goes with --preset: a model is reckoned at the size it was trained on")
    _print_model(model, steps, dtype, quantize, as_json=as_json)


def _print_model(model: str, steps: int, dtype: str | None, quantize: str | None, *, as_json: bool) -> None:
    pipe = load_pipeline(model, dtype=dtype, quantize=quantize)
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
        "parameters": f"{short(cost.total_parameters)}: "
        + ", ".join(f"{name} {short(number)}" for name, number in cost.parameters.items()),
        "frozen / trainable": f"{short(cost.frozen_parameters)} / {short(cost.trainable_parameters)}",
        "active a step": f"{short(cost.active_parameters)} of the replica's {short(cost.trainable_parameters)}",
        "operations a step": f"{short(cost.flops_per_step)}FLOP (guided, prompt of {cost.prompt_tokens} tokens)",
        "operations an image": f"{short(cost.flops_per_image)}FLOP ({steps} steps, prefill and decoder included)",
        "context a prompt": f"{short(cost.context_bytes)}B",
        "weights in memory": f"{short(cost.weight_bytes)}B ({cost.dtype}"
        + (f", matrices {cost.quantization})" if cost.quantization else ")"),
    }
    _print_rows(model, rows)


def _print_presets(name: str, size: int | None, steps: int, *, as_json: bool) -> None:
    from latteflow.evaluate.cost import preset_figures
    from latteflow.models import presets

    names = presets.preset_names() if name == "all" else (name,)
    figures = [preset_figures(presets.preset(one), size=size, steps=steps) for one in names]
    if as_json:
        print(json.dumps(figures if name == "all" else figures[0], indent=2))
    elif name == "all":
        _print_table(figures)
    else:
        _print_rows(name, _preset_rows(figures[0]))


def _preset_rows(figures: dict[str, Any]) -> dict[str, str]:
    side, tokens, batch = figures["picture_size_pixels"], figures["image_tokens"], figures["training_batch"]
    inference, full, lora = (figures[f"{kind}_memory"] for kind in ("inference", "full_training", "lora_training"))
    numbers = {name: short(number) for name, number in figures.items() if isinstance(number, int | float)}
    return {
        "backbone": figures["hub_id"],
        "autoencoder": figures["autoencoder"],
        "picture": f"{side}x{side}, {tokens} tokens",
        "experts": f"{figures['groups']} groups of {figures['layers_per_step']} layers",
        "parameters": f"{numbers['total_parameters']}: "
        + ", ".join(f"{name} {short(number)}" for name, number in figures["parameters"].items()),
        "frozen / trainable": f"{numbers['frozen_parameters']} / {numbers['trainable_parameters']}; "
        f"LoRA of rank {figures['lora_rank']}: {numbers['lora_parameters']}",
        "active a step": f"{numbers['active_parameters']} of the replica's {numbers['trainable_parameters']}",
        "operations a step": f"{numbers['step_flops']}FLOP (guided, prompt of {figures['prompt_tokens']} tokens)",
        "operations an image": f"{numbers['image_flops']}FLOP ({figures['steps']} steps; prefill "
        f"{numbers['prefill_flops']}, decoder {numbers['decode_flops']})",
        "context a token": f"{numbers['context_token_bytes']}B",
        "peak to draw": f"{short(inference['peak_bytes'])}B ({figures['dtype']}, weights "
        f"{short(inference['weight_bytes'])}B)",
        "peak to train": f"{short(full['peak_bytes'])}B, LoRA {short(lora['peak_bytes'])}B ({batch} samples a step, "
        f"{short(full['activation_sample_bytes'])}B a sample)",
    }


def _print_table(figures: list[dict[str, Any]]) -> None:
    """Print Markdown: the table of docs/presets.md."""
    first = figures[0]
    print(
        f"{first['picture_size_pixels']}x{first['picture_size_pixels']}, {first['image_tokens']} tokens, "
        f"{first['steps']} steps, guided, a prompt of {first['prompt_tokens']} tokens, {first['dtype']}; training: "
        f"{first['training_batch']} samples a step, LoRA of rank {first['lora_rank']}. Nothing here is measured.\n"
    )
    columns = {
        "preset": lambda f: f["preset"],
        "K x M": lambda f: f"{f['groups']} x {f['layers_per_step']}",
        "parameters": lambda f: short(f["total_parameters"]),
        "frozen": lambda f: short(f["frozen_parameters"]),
        "trainable": lambda f: short(f["trainable_parameters"]),
        "active a step": lambda f: short(f["active_parameters"]),
        "FLOP a step": lambda f: short(f["step_flops"]),
        "FLOP an image": lambda f: short(f["image_flops"]),
        "context a token": lambda f: short(f["context_token_bytes"]) + "B",
        "peak to draw": lambda f: short(f["inference_memory"]["peak_bytes"]) + "B",
        "to train": lambda f: short(f["full_training_memory"]["peak_bytes"]) + "B",
        "to train LoRA": lambda f: short(f["lora_training_memory"]["peak_bytes"]) + "B",
    }
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for one in figures:
        print(f"| {' | '.join(column(one) for column in columns.values())} |")


def _print_rows(title: str, rows: dict[str, str]) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:<20} {value}")
