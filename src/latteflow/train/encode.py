"""Pictures to latent shards, ahead of training: killed and started again, it leaves what a straight run leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

import torch

from latteflow import __version__
from latteflow.data.contexts import numbers_file
from latteflow.data.latents import DTYPES, MANIFEST, LatentShards
from latteflow.data.shards import open_shard, remove_partial, sha256_of, unpacked, write_json, write_shard
from latteflow.data.sizes import Size, bucket_sizes
from latteflow.data.sources.parquet import ParquetStream
from latteflow.data.sources.source import Source
from latteflow.errors import UserError
from latteflow.train.encode_parts import load_encoder, load_prompter
from latteflow.train.encode_ray import having_ray, run_on_ray
from latteflow.train.encode_work import ContextWork, LatentWork

_QUARANTINE = "quarantine.jsonl"
BUCKET_ASPECT = 2.0
"""How many times one side of a picture may be the other where buckets are asked for. [D]"""


@dataclass(frozen=True)
class EncodeJob:
    """What is encoded, with what, and how."""

    source: Source | ParquetStream
    folder: Path
    """Of the shards."""
    autoencoder: str
    """Folder, hub id, published name or embedded model."""
    size: int
    """Pixels a side."""
    backbone: str | None = None
    """Of the prompts' contexts; None leaves them out."""
    autoencoder_revision: str | None = None
    backbone_revision: str | None = None
    about_source: str = ""
    """What the manifest says of where the pictures are from."""
    buckets: bool = False
    """Several sizes of that area rather than the square alone."""
    patch_size: int = 1
    """The replica's: sides are multiples of what it and the autoencoder shrink them by."""
    shard_size: int = 1024
    batch_size: int = 32
    dtype: str = "bfloat16"
    """Of the latents as they are kept; they are computed in float32."""
    backend: Literal["local", "ray"] = "local"
    workers: int = 0
    """Ray actors; 0 for one a GPU, or one."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto``: a GPU where there is one."""
    readers: int = 4
    """Threads a worker that read pictures ahead."""
    cpu_threads: int = 1
    """Threads a worker that compute, without a GPU."""
    quarantine_limit: float = 0.01
    """The share of samples that may be bad; they are left out."""


@dataclass(frozen=True)
class EncodeProgress:
    """How far a run has come."""

    what: str
    """``latents`` or ``contexts``."""
    done: int
    """Samples, or distinct captions."""
    total: int | None
    """None for a stream, whose end is not known ahead."""
    bad: int = 0


Watch = Callable[[EncodeProgress], None]


def encode(job: EncodeJob, watch: Watch = lambda progress: None) -> LatentShards:
    """Write the shards and, last, the manifest; shards that are there and whole are left as they are.

    Raises:
        UserError: a part cannot be loaded, too many pictures are bad, or the folder holds latents made otherwise.
        OSError: a file cannot be written.
    """
    _check(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    remove_partial(job.folder)
    vae, identity = load_encoder(job.autoencoder, job.autoencoder_revision)
    factor = vae.spatial_compression_ratio * job.patch_size
    sizes = bucket_sizes(job.size, factor=factor, most_aspect=BUCKET_ASPECT if job.buckets else 1.0)
    work = LatentWork(
        folder=job.folder.absolute(),
        source=None if isinstance(job.source, ParquetStream) else job.source,
        autoencoder=job.autoencoder,
        revision=job.autoencoder_revision,
        sizes=sizes,
        shard_size=job.shard_size,
        batch_size=job.batch_size,
        dtype=job.dtype,
        made_with={
            "autoencoder.sha256": identity["sha256"],
            "autoencoder.latent_scale": identity["latent_scale"],
            "sizes": sizes,
            "dtype": job.dtype,
            "shard_size": job.shard_size,
        },
        device=job.device,
        readers=job.readers,
        cpu_threads=job.cpu_threads,
    )
    if job.backend == "local":
        work.load(vae)
    del vae  # of actors each loads its own
    with having_ray(job.workers) if job.backend == "ray" else nullcontext():
        entries = _latents(job, work, watch)
        manifest = _manifest(job, identity, sizes, entries)
        if job.backbone is not None:
            manifest["contexts"] = _contexts(job, job.backbone, entries, watch)
    _write_quarantine(job.folder, entries)
    write_json(job.folder / MANIFEST, manifest)
    return LatentShards(job.folder)


def _check(job: EncodeJob) -> None:
    if job.dtype not in DTYPES:
        raise UserError(f"latents are kept as {', '.join(DTYPES)}: got {job.dtype!r}")
    if job.backend == "local" and job.workers:
        raise UserError(f"{job.workers} workers are Ray's: set encode.backend=ray, or leave encode.workers out")
    if job.backend == "ray" and isinstance(job.source, ParquetStream):
        raise UserError("a stream is read by one process: set encode.backend=local, or do not stream")
    if not isinstance(job.source, ParquetStream) and not len(job.source):
        raise UserError("there is no sample to encode")


def _latents(job: EncodeJob, work: LatentWork, watch: Watch) -> list[dict[str, Any]]:
    """Return the entries of all latent shards, in their order; stop where too many samples are bad."""
    entries: list[dict[str, Any]] = []
    done = bad = ticked = 0
    total = None if isinstance(job.source, ParquetStream) else len(job.source)

    def tick(number: int) -> None:
        nonlocal ticked
        ticked += number
        watch(EncodeProgress("latents", done + ticked, total, bad))

    with closing(_shards(job, work, tick)) as shards:
        for entry in shards:
            entries.append(entry)
            done, ticked = done + entry["samples"] + len(entry["skipped"]), 0
            bad += len(entry["skipped"])
            watch(EncodeProgress("latents", done, total, bad))
            if bad > job.quarantine_limit * (total or done):
                _write_quarantine(job.folder, entries)
                raise UserError(
                    f"{bad} of {total or done} samples are bad, more than data.quarantine_limit="
                    f"{job.quarantine_limit:g} allows. Mend or remove what {job.folder / _QUARANTINE} lists, "
                    f"delete {job.folder}, and start again"
                )
    return sorted(entries, key=lambda entry: entry["file"])


def _shards(job: EncodeJob, work: LatentWork, tick: Callable[[int], None]) -> Generator[dict[str, Any], None, None]:
    """Yield the entries of all latent shards, in any order."""
    if isinstance(job.source, ParquetStream):
        yield from _of_stream(work, job.source, tick)
        return
    numbers = range(math.ceil(len(job.source) / job.shard_size))
    if job.backend == "ray":
        yield from run_on_ray(work, numbers, workers=job.workers, device=job.device)
        return
    for number in numbers:
        yield work(number, tick=tick)


def _of_stream(work: LatentWork, stream: ParquetStream, tick: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a stream's shards; of those that are there the rows are read over."""
    rows, at = None, 0
    for number in count():
        start = number * work.shard_size
        entry = work.written(number)
        if entry is None:
            if rows is None or at != start:
                rows = stream.rows(start)
            first = next(rows, None)
            if first is None:
                return
            some = chain([first], islice(rows, work.shard_size - 1))
            entry = work(number, ((name, partial(stream.sample, row)) for name, row in some), tick)
            at = start + work.shard_size
        yield entry
        if entry["samples"] + len(entry["skipped"]) < work.shard_size:
            return


def _manifest(
    job: EncodeJob, identity: dict[str, Any], sizes: Sequence[Size], entries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    mean, std = _statistics([entry["statistics"] for entry in entries if entry["samples"]])
    shards = [{field: entry[field] for field in ("file", "samples", "bytes", "sha256")} for entry in entries]
    return {
        "format": 1,
        "latteflow": __version__,
        "autoencoder": identity,
        "size": job.size,
        "sizes": sizes,
        "dtype": job.dtype,
        "shard_size": job.shard_size,
        "source": job.about_source,
        "samples": sum(entry["samples"] for entry in entries),
        "bad": sum(len(entry["skipped"]) for entry in entries),
        "latents_mean": mean,
        "latents_std": std,
        "shards": shards,
    }


def _statistics(parts: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return mean and spread a channel of all latents."""
    if not parts:
        raise UserError("no sample could be encoded: all are bad")
    number = sum(part["number"] for part in parts)
    total, squares = (torch.tensor([part[which] for part in parts]).double().sum(0) for which in ("sum", "squares"))
    mean = total / number
    return mean.tolist(), (squares / number - mean.square()).clamp(min=0).sqrt().tolist()


def _write_quarantine(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write down what was left out, as training does; without bad samples there is no file."""
    bad = [{"name": name, "reason": reason} for entry in entries for _, name, reason in entry["skipped"]]
    file = folder / _QUARANTINE
    file.unlink(missing_ok=True)
    if bad:
        file.write_text("".join(json.dumps(entry) + "\n" for entry in bad))


def _contexts(job: EncodeJob, name: str, entries: Sequence[dict[str, Any]], watch: Watch) -> dict[str, Any]:
    """Write the contexts of all distinct captions, and return what the manifest says of them."""
    backbone, processor, identity = load_prompter(name, job.backbone_revision)
    known = {"": 0}
    numbers = [known.setdefault(caption, len(known)) for caption in _captions(job.folder, entries)]
    captions = list(known)
    work = ContextWork(
        folder=job.folder.absolute(),
        backbone=name,
        revision=job.backbone_revision,
        batch_size=job.batch_size,
        made_with={"backbone.sha256": identity["sha256"]},
        device=job.device,
        cpu_threads=job.cpu_threads,
    )
    items = [
        (number, captions[start : start + job.shard_size])
        for number, start in enumerate(range(0, len(captions), job.shard_size))
    ]
    if job.backend == "local":
        work.load((backbone, processor))
        shards = map(work, items)
    else:
        del backbone
        shards = run_on_ray(work, items, workers=job.workers, device=job.device)
    written = []
    for entry in shards:
        written.append(entry)
        done = sum(one["captions"] for one in written)
        watch(EncodeProgress("contexts", done, len(captions)))
    file = numbers_file(job.folder)
    write_shard(file, {"numbers": torch.tensor(numbers)}, {"made_with": work.made_with})
    return {
        "backbone": identity,
        "captions": len(captions),
        "shards": sorted(written, key=lambda entry: entry["file"]),
        "numbers": {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)},
    }


def _captions(folder: Path, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        tensors, _ = open_shard(folder / entry["file"])
        for number in range(entry["samples"]):
            yield unpacked(tensors["captions"], tensors["caption_ends"], number)
