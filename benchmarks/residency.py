"""Peak memory and seconds of drawing with a replica of which two groups at most are in memory, beside the whole one.

    python benchmarks/residency.py --runs 3 --threads 1

The replica has the paper's 28 layers and 4 groups at half of Qwen2-VL-2B's widths, and random bfloat16 weights. A
drawing is 40 guided steps of one picture (two sequences of 64 latents, a random context of 16 words), without backbone
and decoder. Each case runs in a process of its own; Linux only. "cold" has the file's pages dropped from the system's
cache before each drawing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from diffusers.hooks import apply_group_offloading

from latteflow import LatteFlowTransformer, __version__
from latteflow.flow.schedulers import make_scheduler, schedule_times, set_schedule
from latteflow.models.context import Context
from latteflow.models.residency import enable_group_residency
from latteflow.models.weight_store import transformer_without_layers

STEPS, WORDS = 40, 16
GEOMETRY = {
    "num_layers": 28,
    "num_groups": 4,
    "hidden_size": 768,
    "intermediate_size": 4480,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mrope_section": (8, 12, 12),
}
CASES = {
    "whole": "all layers in memory",
    "resident": "group residency from disk",
    "resident cold": "group residency from disk, cold",
    "offloaded": "diffusers' group offloading to disk, 7 blocks a group",
}


def main() -> None:
    """Write the replica, run each case in a child, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=["write", *CASES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to write the replica; left out, a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case == "write":
        write(options.folder)
    elif options.case is not None:
        print(json.dumps(measure(options.case, options.folder, options.runs)))
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            run_all(Path(folder), options.runs, options.threads)


def run_all(folder: Path, runs: int, threads: int) -> None:
    """Run the cases one after the other and print what they measured."""

    def child(case: str) -> str:
        command = [sys.executable, __file__, "--case", case, "--folder", str(folder), "--runs", str(runs)]
        command += ["--threads", str(threads)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    child("write")
    size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    results = {case: json.loads(child(case).splitlines()[-1]) for case in CASES}
    if len({result["picture"] for result in results.values()}) != 1:
        raise SystemExit(f"the cases drew different pictures: {results}")
    print(
        f"latteflow {__version__}, torch {torch.__version__}, {platform.machine()} CPU, {threads} thread(s), bfloat16; "
        f"replica of {size / 1e6:.0f} MB, 28 layers in 4 groups; {STEPS} guided steps, {runs} drawings a case after "
        "one that is not counted; all cases drew the same latents bit for bit. Memory is above the imports'.\n"
    )
    print(
        "| case | peak memory, MB | without file pages, MB | s to load | median s a drawing (lowest to highest) "
        "| processor s |\n| --- | --- | --- | --- | --- | --- |"
    )
    for case, result in results.items():
        seconds, processor = result["seconds"], result["processor"]
        print(
            f"| {CASES[case]} | {result['peak']:.0f} | {result['anonymous']:.0f} | {result['load']:.1f} "
            f"| {statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) "
            f"| {statistics.median(processor):.1f} |"
        )


def write(folder: Path) -> None:
    """Save a replica of random weights, none of them zero."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    replica = LatteFlowTransformer(**GEOMETRY)
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    replica.save_pretrained(folder / "transformer")


def measure(case: str, folder: Path, runs: int) -> dict[str, object]:
    """Return what one case takes: MB above the imports, seconds, and a digest of what it drew."""
    imported = memory()["VmRSS"]
    sampler = AnonymousPeak()
    began = time.perf_counter()
    if case.startswith("resident"):
        replica = transformer_without_layers(folder, torch.bfloat16)
        enable_group_residency(replica, folder)
    else:
        replica = LatteFlowTransformer.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16)
    if case == "offloaded":
        holder = torch.nn.Module()  # of the layers alone: diffusers would take out the rest of the replica for good
        holder.layers = replica.layers
        disk = str(folder / "offloaded")
        apply_group_offloading(holder, torch.device("cpu"), num_blocks_per_group=7, offload_to_disk_path=disk)
    load, seconds, processor, picture = time.perf_counter() - began, [], [], ""
    for _ in range(runs + 1):
        if case.endswith("cold"):
            drop_from_cache(folder)
        began, began_processor = time.perf_counter(), time.process_time()
        picture = draw(replica)
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - began_processor)
    return {
        "load": load,
        "seconds": seconds[1:],
        "processor": processor[1:],
        "peak": memory()["VmHWM"] - imported,
        "anonymous": sampler.stop(),
        "picture": picture,
    }


@torch.no_grad()
def draw(replica: LatteFlowTransformer) -> str:
    """Go from noise to latents; return their digest."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, GEOMETRY["num_layers"], GEOMETRY["num_key_value_heads"], WORDS, GEOMETRY["head_dim"])
    keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    context = Context(keys, values, torch.ones(2, WORDS, dtype=torch.bool), torch.full((2,), WORDS))
    x_t = torch.randn(1, 32, 8, 8, generator=generator)
    scheduler = make_scheduler("euler")
    set_schedule(scheduler, STEPS)
    for t in schedule_times(scheduler):
        pair = torch.cat([x_t, x_t]).bfloat16()
        without, with_prompt = replica(pair, torch.full((2,), t), context).float().chunk(2)
        x_t = x_t + (without + 4.0 * (with_prompt - without)) / STEPS
    return hashlib.sha256(x_t.numpy().tobytes()).hexdigest()


class AnonymousPeak:
    """Samples, in a thread, the memory that is not pages of files: those the system can take back at any time."""

    def __init__(self) -> None:
        self._start = self._peak = memory()["RssAnon"]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(0.02):
            self._peak = max(self._peak, memory()["RssAnon"])

    def stop(self) -> float:
        """Return the peak in MB above the start."""
        self._done.set()
        self._thread.join()
        return self._peak - self._start


def memory() -> dict[str, float]:
    """Return this process's memory in MB, by the names of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1.024e-3 for words in lines if words[-1] == "kB"}


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the file's pages, so that the next read comes from the disk."""
    for file in (folder / "transformer").glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
