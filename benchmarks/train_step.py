"""A training step of a preset's real geometry, formula against measured: one expert group with random weights on a CPU.

    python benchmarks/train_step.py --threads 2 --out benchmarks/results/train_step.md

The slice is one group of the preset's layers at their full width, with its patch embedding, time embedding and head:
what one of K machines trains where groups share no weight. A step is what ``train/loop.py`` does (float32 weights under
bfloat16 autocast, AdamW, averaged weights), on noise; latents and contexts stand for ones computed ahead, so backbone
and autoencoder are not loaded. Each run is a process of its own: one with the C library's allocator as it comes, for
the seconds; one in which every block over 64 KiB is given back at once, for the memory in use. The matrix rate is
measured in the process of the seconds, before and after the steps; operations are counted by
``torch.utils.flop_counter`` in one more step. The first step is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory import CPU, teach
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latteflow import LatteFlowTransformer, __version__
from latteflow.benchmark.measure import peak_bytes
from latteflow.evaluate.memory import TrainingMemory, training_memory
from latteflow.models.flops import step_flops
from latteflow.models.presets import Preset, build_autoencoder, build_backbone, build_transformer, preset, preset_names
from latteflow.train.meter import matrix_rate


def main() -> None:
    """Parse; run one process's share, or both processes, and print a Markdown page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2-vl-2b", choices=preset_names())
    parser.add_argument("--layers", type=int, help="of the slice; left out, the preset's M")
    parser.add_argument("--size", type=int, default=512, help="pixels a side; 512 are 256 tokens")
    parser.add_argument("--context", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--note", default="", help="said of the machine in the page, such as: shared with other work")
    parser.add_argument("--out", type=Path, help="write the page there as well")
    parser.add_argument("--here", action="store_true", help="run in this process and print JSON")
    options = parser.parse_args()
    options.layers = options.layers or preset(options.preset).group_size
    torch.set_num_threads(options.threads)
    if options.here:
        print(json.dumps(run(options)))
        return
    timed = child(options)
    returning = child(options, MALLOC_MMAP_THRESHOLD_="65536")
    page = report(options, {**timed, "in_use_bytes": returning["peak_bytes"]})
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")


def child(options: argparse.Namespace, **environment: str) -> dict[str, Any]:
    """Run the steps in a fresh process."""
    command = [sys.executable, __file__, "--here", *arguments(options)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    return json.loads(result.stdout.splitlines()[-1])


def arguments(options: argparse.Namespace) -> list[str]:
    """Return the words of the command line that say what is run."""
    named = ("preset", "layers", "size", "context", "batch", "steps", "threads")
    return [word for name in named for word in (f"--{name}", str(getattr(options, name)))]


def cut(chosen: Preset, layers: int) -> Preset:
    """Return a preset of one group of so many layers."""
    text = {**chosen.config["text_config"], "num_hidden_layers": layers}
    return replace(chosen, config={**chosen.config, "text_config": text}, num_groups=1)


def latent_side(chosen: Preset, size: int) -> int:
    """Return the side of the latents of pictures of ``size`` pixels a side."""
    return size // build_autoencoder(chosen.autoencoder).spatial_compression_ratio


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build the slice, take the steps, count one more; in this process."""
    rate = matrix_rate(torch.device("cpu"), torch.bfloat16)
    small = LatteFlowTransformer(2, 1, hidden_size=64, intermediate_size=64, num_attention_heads=2,
                                 num_key_value_heads=1, head_dim=32, mrope_section=[])  # fmt: skip
    teach(small, options.context, batch=options.batch, steps=2)
    baseline = peak_bytes(CPU)
    chosen = cut(preset(options.preset), options.layers)
    side = latent_side(chosen, options.size)
    replica = build_transformer(chosen, dtype=torch.float32, device="cpu", sample_size=side)
    nn.init.normal_(replica.io[0].head.weight, std=0.02)  # else no layer gets a gradient
    seconds = teach(replica, options.context, batch=options.batch, steps=options.steps + 1)[1:]
    peak = peak_bytes(CPU) - baseline
    rate = max(rate, matrix_rate(torch.device("cpu"), torch.bfloat16))
    with FlopCounterMode(display=False) as counter:
        teach(replica, options.context, batch=options.batch, steps=1)
    return {
        "passes": [passes for passes, _ in seconds],
        "updates": [update for _, update in seconds],
        "matrix_rate": rate,
        "peak_bytes": peak,
        "counted": counter.get_total_flops() / options.batch,
    }


def formulas(chosen: Preset, options: argparse.Namespace, batch: int) -> tuple[float, TrainingMemory]:
    """Return the operations of a sample, forward and backward, and the memory of a step without the frozen parts."""
    backbone, vae = build_backbone(chosen), build_autoencoder(chosen.autoencoder)
    side = latent_side(chosen, options.size)
    replica = build_transformer(chosen, dtype=torch.float32, sample_size=side)
    memory = training_memory(backbone, replica, vae, prompt_tokens=options.context, batch_size=batch)
    return 3 * step_flops(replica, side**2, options.context), replace(memory, frozen_bytes=0)


def report(options: argparse.Namespace, found: dict[str, Any]) -> str:
    """Return the Markdown page."""
    whole = preset(options.preset)
    flops, memory = formulas(cut(whole, options.layers), options, options.batch)
    every_flops, every_memory = formulas(whole, options, options.batch)
    steps = [sum(both) for both in zip(found["passes"], found["updates"], strict=True)]
    median, rate = statistics.median(steps), found["matrix_rate"]
    mfu = options.batch * flops / median / rate
    passes, updates = (statistics.median(found[name]) for name in ("passes", "updates"))
    numbers = every_memory.trainable_parameters / memory.trainable_parameters
    scaled = passes * every_flops / flops + updates * numbers
    stages = {
        "forward and backward pass": found["passes"],
        "clipping, AdamW, averaged weights": found["updates"],
        "step": steps,
    }
    terms = ", ".join(f"{name} {_giga(getattr(memory, f'{name}_bytes'))}" for name in _TERMS)
    lines = [
        f"# benchmarks/train_step.py, {options.preset}, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/train_step.py {' '.join(arguments(options))}`",
        "",
        f"latteflow {__version__}, torch {torch.__version__}, {platform.machine()} CPU with {os.cpu_count()} cores, "
        f"{options.threads} threads; float32 weights under bfloat16 autocast, random, AdamW and averaged weights; one "
        f"group of {options.layers} layers, {memory.trainable_parameters / 1e6:,.0f}M parameters; {options.batch} "
        f"samples a step of {options.size}x{options.size}: {latent_side(whole, options.size) ** 2} tokens, with "
        f"{options.context} tokens of context; {options.steps} steps after one. {options.note}".rstrip(),
        "",
        "| | measured | by formula | measured / formula |",
        "| --- | --- | --- | --- |",
        _compared("GFLOP a sample, forward and backward", found["counted"], flops),
        _compared("GB at the peak, in use", found["in_use_bytes"], memory.peak_bytes),
        _compared("GB at the peak, with the default allocator", found["peak_bytes"], memory.peak_bytes),
        "",
        f"Operations are counted, not timed. Memory is beside what the process held before; by formula, GB: {terms}.",
        "",
        "| | seconds: median (10th to 90th percentile) | share of the step |",
        "| --- | --- | --- |",
        *(f"| {name} | {_spread(times)} | {statistics.median(times) / median:.0%} |" for name, times in stages.items()),
        "",
        f"{options.batch / median:.3f} images/s. Matrices of bfloat16 reach {rate / 1e9:,.0f} GFLOP/s in the same "
        f"process. MFU (operations by formula / time / that rate): {mfu:.1%} of the step, "
        f"{mfu * median / passes:.1%} of forward and backward pass.",
        "",
        "## The whole geometry",
        "",
        "| | memory | images/s |",
        "| --- | --- | --- |",
        f"| the slice, CPU, measured | {_giga(found['in_use_bytes'])} GB | {options.batch / median:.3f} |",
        f"| all {whole.num_groups} x {whole.group_size} layers, CPU, by formula: not measured | "
        f"{_giga(every_memory.peak_bytes)} GB | {options.batch / scaled:.3f}, passes scaled by operations, updates by "
        "parameters |",
        f"| all {whole.num_groups} x {whole.group_size} layers, one GPU | not measured | not measured |",
        "",
        f"Both without backbone and autoencoder. A sample passes through one group of {whole.group_size} layers: "
        f"{every_flops / 1e9:,.0f} GFLOP, forward and backward.",
    ]
    return "\n".join(lines) + "\n"


_TERMS = ("weight", "optimizer", "average", "context", "activation", "autocast", "gradient", "update")


def _compared(name: str, measured: float, formula: float) -> str:
    return f"| {name} | {measured / 1e9:,.2f} | {formula / 1e9:,.2f} | {measured / formula:.4f} |"


def _giga(number: float) -> str:
    return f"{number / 1e9:,.2f}"


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return f"{statistics.median(ordered):.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
