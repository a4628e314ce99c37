"""Quantised weights of a model: bytes, seconds a picture, distance from the float32 drawings, and what is evaluated.

    python benchmarks/quantized.py --data data/emoji --drawings 64 --seeds 1 --threads 1

Every case is loaded from the same files; timings are interleaved, and left out with ``--runs 0``, as on a busy machine.
Then, at the widths of Qwen2-VL-2B and with random weights, a step and the memory of a process that loads weights and
takes steps: there matrices are large enough to tell. Linux only. Writes ``--out``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pages import table

from latteflow import LatteFlowPipeline, LatteFlowTransformer, __version__
from latteflow.evaluate.embedded import evaluate_embedded
from latteflow.evaluate.memory import weight_bytes
from latteflow.models.context import Context
from latteflow.models.embedded import resolve_model
from latteflow.models.quantization import QUANTIZATIONS, quantization_config

CASES = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8, float32": (torch.float32, "int8"),
    "int8, bfloat16": (torch.bfloat16, "int8"),
    "fp8, float32": (torch.float32, "fp8"),
    "fp8, bfloat16": (torch.bfloat16, "fp8"),
}
"""Dtype of activations and of plain weights, and the quantisation of matrices."""
PROMPTS = [
    f"{what}, {style} style"
    for what in ("red heart", "umbrella", "grinning face", "automobile")
    for style in ("noto", "fluent 3d")
]
WIDE = {
    "plain": ("plain", None),
    "int8, saved": ("int8", None),
    "fp8, saved": ("fp8", None),
    "int8, made while loading": ("plain", "int8"),
    "fp8, made while loading": ("plain", "fp8"),
}
"""Cases of the wide replica, all in bfloat16: the folder it is loaded from, and the quantisation asked for."""
WIDE_LAYERS, WIDE_PROCESSES = 4, 5


def main() -> None:
    """Parse; run everything, or the one wide case this process was started for; write the Markdown page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-64")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--judge", type=Path, help="folder of the trained judge; left out, it is not asked")
    parser.add_argument("--drawings", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5, help="timed drawings, and timed steps; 0 for no timings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantized.md")
    parser.add_argument("--wide", choices=["write", *WIDE], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.wide == "write":
        write_wide(options.folder)
    elif options.wide is not None:
        print(json.dumps(measure_wide(options.folder, *WIDE[options.wide], options.runs)))
    else:
        page = report(options)
        print(page)
        options.out.write_text(page)


def report(options: argparse.Namespace) -> str:
    """Return the page: conditions, the model's table, the wide replica's."""
    pipes = {name: load(options.model, *case) for name, case in CASES.items()}
    seconds = times(pipes, options.runs, options.steps)
    drawn = {name: draw(pipe, options.steps) for name, pipe in pipes.items()}
    figures = {name: evaluated(name, pipe, options) for name, pipe in pipes.items()}
    conditions = next(iter(figures.values()))["conditions"]
    header = ["matrices, dtype", "weights, MB", *(["s a picture"] if options.runs else []), "off float32"]
    header += ["real pictures: concept, style, category", "drawn, then asked: the same", "autoencoder, dB"]
    rows = []
    for name, pipe in pipes.items():
        sizes = [weight_bytes(part) / 1e6 for part in (pipe.backbone, pipe.transformer, pipe.vae)]
        weights = f"{sum(sizes):.1f} = {' + '.join(f'{size:.1f}' for size in sizes)}"
        off = f"{(drawn[name] - drawn['float32']).abs().mean().item():.5f}"
        real = shares(figures[name]["understanding"])
        asked = shares({key: value["mean"] for key, value in figures[name]["drawn_then_asked"].items()})
        decibels = f"{figures[name]['autoencoder_psnr_db']:.2f}"
        rows.append([name, weights, *([spread(seconds[name])] if options.runs else []), off, real, asked, decibels])
        if "judge" in figures[name]:
            judged = shares({key: value["mean"] for key, value in figures[name]["judge"]["drawn"].items()})
            rows.append([f"{name}, judge", *[""] * (len(header) - 3), judged, ""])
    return "\n".join([*introduction(options, conditions), *table(header, rows), "", *wide_table(options)]) + "\n"


def introduction(options: argparse.Namespace, conditions: dict[str, Any]) -> list[str]:
    """Return what was run, and what the columns of the first table are."""
    timed = (
        f"Seconds: one picture, prompt and decoder included, median of {options.runs} interleaved (lowest to highest)."
        if options.runs
        else "Seconds were not measured: the machine was busy with other work."
    )
    return [
        f"# benchmarks/quantized.py, {date.today().isoformat()}",
        "",
        f"`python benchmarks/quantized.py --drawings {options.drawings} --seeds {options.seeds} "
        f"--steps {options.steps} --runs {options.runs} --threads {options.threads}`",
        "",
        f"{options.model}, latteflow {__version__}, torch {torch.__version__}, torchao {version('torchao')}, "
        f"{platform.machine()} CPU, {options.threads} thread(s); {options.steps} steps, guidance 4. Weights: counted, "
        f"in MB of 10^6 bytes, of backbone, replica and autoencoder. {timed} Off float32: mean difference of pixels in "
        f"[0, 1], of the same {len(PROMPTS)} prompts and noise. The rest is `latteflow evaluate`: "
        f"{conditions['heldout_pictures']} held-out pictures, {conditions['drawings']} drawings, "
        f"{len(conditions['seeds'])} seed(s), exact answers.",
        "",
    ]


def load(model: str, dtype: torch.dtype, quantize: str | None) -> LatteFlowPipeline:
    """Load the model in one of the cases."""
    settings: dict[str, Any] = {} if quantize is None else {"quantization_config": quantization_config(quantize)}
    pipe = LatteFlowPipeline.from_pretrained(model, dtype=dtype, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def times(pipes: dict[str, LatteFlowPipeline], runs: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds of single drawings, one of each case after the other; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for run in range(runs + 1 if runs else 0):
        for name, pipe in pipes.items():
            began = time.perf_counter()
            pipe(PROMPTS[0], num_inference_steps=steps, generator=torch.Generator().manual_seed(run))
            seconds[name] += [time.perf_counter() - began] if run else []
    return seconds


def draw(pipe: LatteFlowPipeline, steps: int) -> torch.Tensor:
    """Return one picture a prompt, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS, num_inference_steps=steps, generator=generator, output_type="pt").images


def evaluated(name: str, pipe: LatteFlowPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of ``latteflow evaluate``."""
    return evaluate_embedded(
        pipe,
        Path(resolve_model(options.model)),
        options.data,
        drawings=options.drawings,
        steps=options.steps,
        seeds=range(options.seeds),
        judge=options.judge,
        watch=lambda message: print(f"{name}: {message}", file=sys.stderr),
    )


def wide_table(options: argparse.Namespace) -> list[str]:
    """Write the wide replica plain and quantised, measure each in a process of its own, return a table."""
    with tempfile.TemporaryDirectory() as folder:

        def child(case: str) -> str:
            command = [sys.executable, __file__, "--wide", case, "--folder", folder]
            command += ["--runs", str(options.runs), "--threads", str(options.threads)]
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

        child("write")
        runs = [(case, json.loads(child(case).splitlines()[-1])) for _ in range(WIDE_PROCESSES) for case in WIDE]
    header = ["matrices", "weights, MB", "peak, MB", *(["s to load", "s a step"] if options.runs else [])]
    rows = []
    for case in WIDE:
        results = [result for name, result in runs if name == case]
        sizes = [f"{results[0]['weights'] / 1e6:.0f}", spread([result["peak"] / 1e6 for result in results], 0)]
        load, step = [result["load"] for result in results], [one for result in results for one in result["seconds"]]
        rows.append([case, *sizes, *([spread(load, 1), spread(step)] if options.runs else [])])
    return [
        f"{WIDE_LAYERS} layers of Qwen2-VL-2B's widths in one group, random weights, bfloat16; a guided step: two "
        f"sequences of 64 latents behind 16 words. {WIDE_PROCESSES} processes a case: median (lowest to highest). "
        "Peak: the most memory resident in a process that loads the weights and takes steps, above the imports'; pages "
        "of mapped files count, which the system may take back. Quantised weights are read as they were saved, or made "
        "from plain ones while those are loaded.",
        "",
        *table(header, rows),
    ]


def write_wide(folder: Path) -> None:
    """Save a replica of random weights, plain and quantised."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LatteFlowTransformer(num_layers=WIDE_LAYERS, num_groups=1).save_pretrained(folder / "plain")
    for quantize in QUANTIZATIONS:
        load_wide(folder / "plain", quantize).save_pretrained(folder / quantize)


def load_wide(folder: Path, quantize: str | None) -> LatteFlowTransformer:
    """Load a replica in bfloat16, as it was saved or quantised while loading."""
    config = None if quantize is None else quantization_config(quantize).quant_mapping["transformer"]
    return LatteFlowTransformer.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config).eval()


@torch.no_grad()
def measure_wide(folder: Path, saved: str, quantize: str | None, runs: int) -> dict[str, Any]:
    """Load a replica, take steps; return bytes and seconds."""
    imported = resident_bytes("VmRSS")
    began = time.perf_counter()
    replica = load_wide(folder / saved, quantize)
    loaded, seconds, config = time.perf_counter() - began, [], replica.config
    shape = (2, config.num_layers, config.num_key_value_heads, 16, config.head_dim)
    keys, values = torch.randn(2, *shape, dtype=torch.bfloat16)
    context = Context(keys, values, torch.ones(2, 16, dtype=torch.bool), torch.full((2,), 16))
    x_t = torch.randn(2, config.latent_channels, 8, 8, dtype=torch.bfloat16)
    for _ in range(runs + 1):
        began = time.perf_counter()
        replica(x_t, 0.5, context)
        seconds.append(time.perf_counter() - began)
    peak = resident_bytes("VmHWM") - imported
    return {"load": loaded, "seconds": seconds[1:], "peak": peak, "weights": weight_bytes(replica)}


def resident_bytes(field: str) -> int:
    """Return what is ("VmRSS"), or at most was ("VmHWM"), resident; ``ru_maxrss`` would start from the parent's."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024


def spread(values: list[float], digits: int = 3) -> str:
    """Return median, lowest and highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def shares(values: dict[str, float]) -> str:
    """Return shares in percent, in their order."""
    return ", ".join(f"{100 * value:.1f}%" for name, value in values.items() if name != "judged")


if __name__ == "__main__":
    main()
