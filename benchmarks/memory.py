"""Peak memory, predicted by ``latteflow/evaluate/memory.py`` and measured: presets with random weights on a CPU.

    python benchmarks/memory.py --threads 2 --out benchmarks/results/memory.md

Each case is a process of its own. Measured is the kernel's own high-water mark of the resident set (``VmHWM``), less
what the process held once a toy picture had been drawn (and a toy trained) and so every library was loaded. It is
measured twice: with the C library's allocator as it comes, which keeps what is freed for later, and told to give every
block over 64 KiB back at once (``MALLOC_MMAP_THRESHOLD_=65536``), which leaves what is in use.
Drawing is ``LatteFlowPipeline.__call__``; training puts together what ``train/loop.py`` does, on noise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from latteflow import LatteFlowPipeline, LatteFlowTransformer, __version__
from latteflow.benchmark.measure import peak_bytes
from latteflow.evaluate.memory import LORA_RANK, inference_memory, training_memory
from latteflow.flow.objective import layerwise_flow_loss
from latteflow.flow.path import interpolate, target_velocity
from latteflow.flow.schedulers import make_scheduler
from latteflow.flow.timesteps import balanced_groups, sample_timesteps
from latteflow.models.autoencoder import small_autoencoder
from latteflow.models.backbones.small_qwen2_vl import small_backbone, small_processor, train_tokenizer
from latteflow.models.context import Context
from latteflow.models.presets import Preset, build_autoencoder, build_backbone, build_transformer, preset

CPU = torch.device("cpu")
PROMPT = "a photo of a slice of pizza on a wooden table, soft light from the left, shallow depth of field"
CASES = (
    "draw smolvlm-256m",
    "draw smolvlm-500m",
    "draw qwen2-vl-2b",
    "train smolvlm-256m",
    "train-lora smolvlm-256m",
)
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Parse; run one case in this process, or all of them each in its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="run one case here and print JSON")
    parser.add_argument("--steps", type=int, default=4, help="network calls, or optimizer steps: peaks do not depend")
    parser.add_argument("--batch", type=int, default=32, help="samples an optimizer step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the table there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        kind, name = options.case.split()
        run = draw if kind == "draw" else fit
        print(json.dumps(run(preset(name), options, lora=kind == "train-lora")))
        return
    table = report([child(case, options) for case in CASES], options)
    print(table)
    if options.out:
        options.out.write_text(table)


def child(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a fresh process."""
    arguments = ["--steps", options.steps, "--batch", options.batch, "--threads", options.threads]
    command = [sys.executable, __file__, "--case", case, *map(str, arguments)]
    runs = {}
    for allocator, setting in (("default", {}), ("returning", {"MALLOC_MMAP_THRESHOLD_": "65536"})):
        result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **setting})
        runs[allocator] = json.loads(result.stdout.splitlines()[-1])
    return {"case": case, "default_bytes": runs["default"]["measured_bytes"], **runs["returning"]}


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the Markdown page."""
    lines = [
        "# benchmarks/memory.py",
        "",
        f"`python benchmarks/memory.py --threads {options.threads} --steps {options.steps} --batch {options.batch}`",
        "",
        f"latteflow {__version__}, torch {torch.__version__}, {platform.machine()} CPU, {options.threads} threads. "
        f"256x256; drawing: bfloat16, one picture, guided; training: {options.batch} samples a step, float32 weights "
        f"under bfloat16 autocast, backbone and autoencoder resident in bfloat16; LoRA: rank {LORA_RANK} beside the "
        "seven matrices of every layer, the replica in bfloat16. All in MB of 10^6 bytes, measured ones less what the "
        "process held before (libraries, a toy drawn).",
        "",
        "| case | prompt tokens | predicted | in use | ratio | with the default allocator | ratio | before |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        predicted, used, default = (
            value / 1e6
            for value in (result["predicted"]["peak_bytes"], result["measured_bytes"], result["default_bytes"])
        )
        before, tokens = result["baseline_bytes"] / 1e6, result["prompt_tokens"]
        lines.append(
            f"| {result['case']} | {tokens} | {predicted:,.0f} | {used:,.0f} | {used / predicted:.3f} | "
            f"{default:,.0f} | {default / predicted:.3f} | {before:,.0f} |"
        )
    lines += ["", "Predicted, term by term, in MB:", ""]
    for result in results:
        terms = ", ".join(
            f"{name.removesuffix('_bytes')} {value / 1e6:,.1f}"
            for name, value in result["predicted"].items()
            if name.endswith("_bytes") and name != "peak_bytes"
        )
        lines.append(f"- {result['case']}: {terms}")
    return "\n".join(lines) + "\n"


def draw(chosen: Preset, options: argparse.Namespace, *, lora: bool) -> dict[str, Any]:
    """Draw one picture with a preset."""
    processor = warm_up()
    baseline = peak_bytes(CPU)
    backbone = build_backbone(chosen, device="cpu")
    replica = build_transformer(chosen, backbone).eval()
    nn.init.normal_(replica.io[0].head.weight, std=0.02)  # else the velocity is zero
    vae = build_autoencoder(chosen.autoencoder, device="cpu")
    pipe = LatteFlowPipeline(backbone, processor, replica, vae, make_scheduler("euler"))
    pipe.set_progress_bar_config(disable=True)
    built = peak_bytes(CPU)
    tokens = int(pipe.encode_prompt([PROMPT]).mask.sum())
    pipe(PROMPT, num_inference_steps=options.steps, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
    predicted = inference_memory(backbone, replica, vae, prompt_tokens=tokens)
    return {
        "prompt_tokens": tokens,
        "baseline_bytes": baseline,
        "built_bytes": built - baseline,
        "measured_bytes": peak_bytes(CPU) - baseline,
        "predicted": predicted.as_dict(),
    }


def warm_up() -> Any:
    """Draw a toy picture, so that every library is loaded; return a processor with few tokens."""
    tokenizer = train_tokenizer([PROMPT, "what is this?"] * 4, vocabulary=400)
    processor = small_processor(tokenizer, picture_size=32, patch_size=8)
    backbone = small_backbone(
        tokenizer,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_key_value_heads=1,
        vision_depth=1,
        vision_width=32,
        vision_heads=2,
        patch_size=8,
    ).to(torch.bfloat16)  # type: ignore[arg-type]
    vae = small_autoencoder(latent_channels=4, widths=(8, 8), layers=(1, 1))
    replica = LatteFlowTransformer.from_backbone(backbone, num_groups=1, latent_channels=4, sample_size=4)
    pipe = LatteFlowPipeline(backbone, processor, replica, nn.Module.to(vae, torch.bfloat16), make_scheduler("euler"))
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT, num_inference_steps=1)
    return processor


def fit(chosen: Preset, options: argparse.Namespace, *, lora: bool) -> dict[str, Any]:
    """Train the replica of a preset for some steps, on noise."""
    processor = warm_up()
    tokens = len(processor.tokenizer(PROMPT)["input_ids"])
    small = LatteFlowTransformer(2, 1, hidden_size=64, intermediate_size=64, num_attention_heads=2,
                                 num_key_value_heads=1, head_dim=32, mrope_section=[])  # fmt: skip
    teach(small, tokens, batch=4, steps=2)
    baseline = peak_bytes(CPU)
    backbone = build_backbone(chosen, device="cpu")
    vae = build_autoencoder(chosen.autoencoder, device="cpu")
    replica = build_transformer(chosen, dtype=torch.bfloat16 if lora else torch.float32, device="cpu")
    predicted = training_memory(
        backbone, replica, vae, prompt_tokens=tokens, batch_size=options.batch, lora_rank=LORA_RANK if lora else None
    )
    nn.init.normal_(replica.io[0].head.weight, std=0.02)  # else no layer gets a gradient
    if lora:
        from peft import LoraConfig

        replica.requires_grad_(False)
        replica.add_adapter(LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS))
    teach(replica, tokens, batch=options.batch, steps=options.steps)
    trained = sum(p.numel() for p in replica.parameters() if p.requires_grad)
    assert trained == predicted.trainable_parameters, (trained, predicted.trainable_parameters)
    return {
        "prompt_tokens": tokens,
        "baseline_bytes": baseline,
        "measured_bytes": peak_bytes(CPU) - baseline,
        "predicted": predicted.as_dict(),
    }


def teach(replica: LatteFlowTransformer, tokens: int, *, batch: int, steps: int) -> list[tuple[float, float]]:
    """Run optimizer steps of the parts that ``train/loop.py`` and ``train/generator.py`` put together.

    Returns:
        The seconds of every step: of forward and backward pass, and of clipping, AdamW and averaged weights.
    """
    config, seconds = replica.config, []
    parameters = [p for p in replica.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    shape = (batch, config.num_layers, config.num_key_value_heads, tokens, config.head_dim)
    side = config.sample_size
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        context = Context(
            torch.randn(shape, dtype=torch.bfloat16),
            torch.randn(shape, dtype=torch.bfloat16),
            torch.ones(batch, tokens, dtype=torch.bool),
            torch.full((batch,), tokens),
        )
        x_0, x_1 = torch.randn(2, batch, config.latent_channels, side, side, generator=generator)
        groups = balanced_groups(batch, config.num_groups, generator=generator)
        t = sample_timesteps(groups, replica.intervals, generator=generator)
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = replica(interpolate(x_0, x_1, t), t, context)
            loss = layerwise_flow_loss(v.float(), target_velocity(x_0, x_1), groups, config.num_groups).total
        loss.backward()
        del v, loss
        turned = time.perf_counter()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(parameters)
        seconds.append((turned - began, time.perf_counter() - turned))
    return seconds


if __name__ == "__main__":
    main()
