"""The real geometry really run: a preset with random weights draws a picture on this machine, end to end.

    python benchmarks/preset.py --preset qwen2-vl-2b --steps 40 --threads 2 --out benchmarks/results/preset.md

Backbone, replica and DC-AE have the sizes of the published models and random weights; the tokenizer is a small one,
trained on the spot. ``LatteFlowPipeline.__call__`` draws: prompt, every step, decoder and PIL image. What is drawn is
noise; what it costs is what the trained model would cost. A first, short run is left out. Operations are counted by
``torch.utils.flop_counter`` in separate calls, and held against the formulas of ``latteflow/evaluate/cost.py``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latteflow import LatteFlowPipeline, __version__
from latteflow.benchmark.measure import peak_bytes
from latteflow.evaluate.cost import active_parameters, cost_of_parts
from latteflow.evaluate.memory import inference_memory
from latteflow.flow.schedulers import make_scheduler
from latteflow.models.backbones.small_qwen2_vl import small_processor, train_tokenizer
from latteflow.models.context import concatenate
from latteflow.models.presets import build_autoencoder, build_backbone, build_transformer, preset, preset_names

CPU = torch.device("cpu")
PROMPT = "a photo of a slice of pizza on a wooden table, soft light from the left, shallow depth of field"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """Parse, build, draw, count, print a Markdown page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2-vl-2b", choices=preset_names())
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", type=int, help="pixels a side; left out, the preset's")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--group-size", type=int, help="M, layers a step; left out, the preset's")
    parser.add_argument("--guidance", type=float, default=4.0, help="1 draws without guidance")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--note", default="", help="said of the machine in the page, such as: shared with other work")
    parser.add_argument("--out", type=Path, help="write the page there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    loaded = peak_bytes(CPU)
    pipe, build_seconds = build(options)
    size = options.size or preset(options.preset).picture_size
    draw(pipe, size, 2, options.guidance)  # warm-up
    began = time.perf_counter()
    image, marks = draw(pipe, size, options.steps, options.guidance)
    whole, peak = time.perf_counter() - began, peak_bytes(CPU) - loaded
    assert image.size == (size, size)
    page = report(pipe, options, size, {"build": build_seconds, "whole": whole, "marks": marks, "peak": peak})
    print(page)
    if options.out:
        options.out.write_text(page)


def build(options: argparse.Namespace) -> tuple[LatteFlowPipeline, float]:
    """Return the pipeline and how long its weights took to draw."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([PROMPT] * 4, vocabulary=400)  # ids far below the real vocabulary
    chosen, dtype = preset(options.preset), DTYPES[options.dtype]
    began = time.perf_counter()
    backbone = build_backbone(chosen, dtype, "cpu")
    replica = build_transformer(chosen, backbone, group_size=options.group_size).eval()
    nn.init.normal_(replica.io[0].head.weight, std=0.02)  # at its start the velocity is zero
    vae = build_autoencoder(chosen.autoencoder, dtype, "cpu")
    seconds = time.perf_counter() - began
    processor = small_processor(tokenizer, picture_size=224, patch_size=14)
    pipe = LatteFlowPipeline(backbone, processor, replica, vae, make_scheduler("euler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe, seconds


def draw(pipe: LatteFlowPipeline, size: int, steps: int, guidance: float) -> tuple[Any, dict[str, Any]]:
    """Draw one picture; return it and the seconds of the prefill, of every step and of the decoder."""
    pipe._unconditional = {}  # both prompts are read anew
    marks: dict[str, Any] = {"prefill": 0.0, "steps": [], "decode": 0.0}
    inner = {"prefill": pipe.encode_prompt, "decode": pipe.decode}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            result = inner[name](*arguments, **settings)
            marks[name] += time.perf_counter() - began
            marks["last"] = time.perf_counter()
            return result

        return call

    def step_ended(*_: Any) -> None:
        now = time.perf_counter()
        marks["steps"].append(now - marks["last"])
        marks["last"] = now

    pipe.encode_prompt, pipe.decode = timed("prefill"), timed("decode")
    try:
        image = pipe(
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=step_ended,
        ).images[0]
    finally:
        del pipe.encode_prompt, pipe.decode
    return image, marks


@torch.no_grad()
def counted_flops(pipe: LatteFlowPipeline, side: int, guided: bool) -> dict[str, float]:
    """Return the operations of one network call, one prompt and the decoder as PyTorch counts them."""

    def of(call: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())

    context = pipe.encode_prompt([PROMPT])
    context, number = (concatenate([context, context]), 2) if guided else (context, 1)
    x_t = torch.randn(number, pipe.transformer.config.latent_channels, side, side, dtype=pipe.transformer.dtype)
    # The attention that PyTorch picks on a CPU has no formula in the counter.
    pipe.backbone.set_attn_implementation("eager")
    return {
        "step": of(lambda: pipe.transformer(x_t, torch.full((number,), 0.3), context)),
        "prefill": of(lambda: pipe.encode_prompt([PROMPT])),
        "decode": of(lambda: pipe.decode(x_t[:1])),
    }


def report(pipe: LatteFlowPipeline, options: argparse.Namespace, size: int, run: dict[str, Any]) -> str:
    """Return the Markdown page."""
    replica, guided, marks = pipe.transformer, options.guidance != 1.0, run["marks"]
    side = size // pipe.vae.spatial_compression_ratio
    tokens = int(pipe.encode_prompt([PROMPT]).mask.sum())
    parts = (pipe.backbone, replica, pipe.vae)
    cost = cost_of_parts(*parts, prompt_tokens=tokens, latent_side=side, steps=options.steps, guided=guided)
    need = inference_memory(*parts, prompt_tokens=tokens, latent_side=side, guided=guided)
    counted = counted_flops(pipe, side, guided)
    formula = {"step": cost.flops_per_step, "prefill": cost.flops_prefill, "decode": cost.flops_decode}
    seconds = sorted(marks["steps"])
    low, median, high = seconds[len(seconds) // 10], statistics.median(seconds), seconds[-1 - len(seconds) // 10]
    stages = {"step": median, "prefill": marks["prefill"] / (2 if guided else 1), "decode": marks["decode"]}
    names = {"step": "one guided step" if guided else "one step", "prefill": "one prompt", "decode": "decoder"}
    numbers = ", ".join(f"{name} {number / 1e6:,.0f}M" for name, number in cost.parameters.items())
    lines = [
        f"# benchmarks/preset.py, {options.preset}, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/preset.py --preset {options.preset} --steps {options.steps} --size {size} --dtype "
        f"{options.dtype} --group-size {replica.group_size} --guidance {options.guidance:g} --threads "
        f"{options.threads}`",
        "",
        f"latteflow {__version__}, torch {torch.__version__}, {platform.machine()} CPU with {os.cpu_count()} cores, "
        f"{options.threads} threads, {options.dtype}, random weights, Euler, guidance {options.guidance:g}, batch 1, "
        f"prompt of {tokens} tokens, {size}x{size}: {cost.image_tokens} tokens. {options.note}".rstrip(),
        "",
        f"{cost.total_parameters / 1e9:.2f}B parameters ({numbers}); K = {cost.groups}, M = {replica.group_size}, "
        f"{active_parameters(replica) / 1e6:,.0f}M active a step. Weights drawn in {run['build']:.0f} s.",
        "",
        "| | seconds | GFLOP counted | GFLOP by formula | counted / formula | GFLOP/s |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {names[name]} | {stages[name]:.3f} | {counted[name] / 1e9:.1f} | {formula[name] / 1e9:.1f} | "
            f"{counted[name] / formula[name]:.4f} | {formula[name] / stages[name] / 1e9:.0f} |"
            for name in names
        ),
        f"| whole picture, {options.steps} steps | {run['whole']:.1f} | | {cost.flops_per_image / 1e9:,.0f} | | "
        f"{cost.flops_per_image / run['whole'] / 1e9:.0f} |",
        "",
        f"A step: median {median:.3f} s, lowest {seconds[0]:.3f}, 10th to 90th percentile {low:.3f} to {high:.3f}. It "
        f"reads {active_parameters(replica) * replica.dtype.itemsize / 1e9:.2f} GB of weights. Its seconds in the "
        "table are the median, a prompt's the mean of two. The map of the latents' places is computed once for both "
        "sequences of guidance; the formula counts it in each.",
        "",
        f"Peak memory {run['peak'] / 1e9:.2f} GB beside the libraries, {need.peak_bytes / 1e9:.2f} GB by formula "
        f"(weights {need.weight_bytes / 1e9:.2f} GB).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
