"""Seconds a picture: the embedded model, and the same layers run all at every step (K = 1, the paper's Vanilla).

    python benchmarks/draw.py --runs 20 --threads 2

Runs are interleaved, after one warm-up each; the median and the range are printed, with the conditions. The Vanilla
row has the same layers' weights in one group: it costs what Vanilla costs, it does not draw what Vanilla would.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch

from latteflow import LatteFlowPipeline, LatteFlowTransformer, __version__


def main() -> None:
    """Parse, time, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-64")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipe = LatteFlowPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    experts = pipe.transformer
    vanilla = LatteFlowTransformer.from_config(
        {**experts.config, "num_groups": 1, "intervals": None, "shared_io": True}
    )
    vanilla.load_state_dict(experts.state_dict(), strict=False)
    cases = {
        f"K = {experts.config.num_groups}, batch 1": (experts, 1),
        "K = 1 (Vanilla), batch 1": (vanilla.eval(), 1),
        f"K = {experts.config.num_groups}, batch 16": (experts, 16),
        "K = 1 (Vanilla), batch 16": (vanilla, 16),
    }
    whole: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(options.runs + 1):
        for name, (transformer, batch) in cases.items():
            pipe.transformer = transformer
            began = time.perf_counter()
            pipe(
                "a slice of pizza, noto style",
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                num_images_per_prompt=batch,
                generator=torch.Generator().manual_seed(run),
            )
            if run:  # the first is the warm-up
                whole[name].append((time.perf_counter() - began) / batch)

    print(
        f"{options.model}, latteflow {__version__}, torch {torch.__version__}, {platform.machine()} CPU, "
        f"{options.threads} threads, {str(experts.dtype).removeprefix('torch.')}, {options.steps} steps, guidance "
        f"{options.guidance:g}, {options.runs} runs interleaved; prompt, all steps, decoder and PIL image included\n"
    )
    print("| case | median s an image | lowest | highest |\n| --- | --- | --- | --- |")
    for name, seconds in whole.items():
        print(f"| {name} | {statistics.median(seconds):.4f} | {min(seconds):.4f} | {max(seconds):.4f} |")


if __name__ == "__main__":
    main()
