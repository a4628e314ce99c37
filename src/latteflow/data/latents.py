"""Latents ahead of training: shards on the disk, found by sample number, and what they were made with.

A folder holds ``latents-00000.safetensors`` and so on, each of the pictures of a fixed range of the source, and
``manifest.json``, written last: which autoencoder, which sizes, how many samples, what each shard's bytes are.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latteflow.data.contexts import ContextShards
from latteflow.data.shards import (
    ShardDamaged,
    open_shard,
    packed,
    sha256_of,
    tensors_sha256,
    unpacked,
    verified_shard,
    write_shard,
)
from latteflow.data.sizes import Size
from latteflow.errors import UserError

MANIFEST = "manifest.json"
DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What latents can be kept as."""


def autoencoder_identity(vae: nn.Module, name: str, revision: str | None = None) -> dict[str, Any]:
    """Return what says which autoencoder latents are of: its name, revision, scale, and a hash of its encoder.

    Loaded in float32. The decoder has no part in it: latents are any decoder's that shares their encoder.
    """
    return {
        "name": name,
        "revision": revision,
        "sha256": tensors_sha256(vae.encoder.state_dict()),  # type: ignore[union-attr]
        "latent_scale": float(vae.config.scaling_factor),  # type: ignore[union-attr, arg-type]
    }


@dataclass(frozen=True)
class Encoded:
    """The samples of one shard."""

    names: Sequence[str]
    captions: Sequence[str]
    buckets: Sequence[int]
    """The number of each sample's size."""
    latents: Sequence[torch.Tensor]
    """Of each, (channels, height, width), scaled by the autoencoder's factor."""
    skipped: Sequence[tuple[int, str, str]]
    """The bad samples: place in the shard's range, name, and what is wrong."""


def shard_file(folder: Path, number: int) -> Path:
    """Return where a latent shard is."""
    return folder / f"latents-{number:05d}.safetensors"


def write_latents(file: Path, samples: Encoded, sizes: Sequence[Size], made_with: Mapping[str, Any]) -> None:
    """Write one shard.

    Args:
        file: where.
        samples: its samples, latents in the dtype in which they are kept.
        sizes: what bucket numbers stand for.
        made_with: everything that the values depend on; checked when a run is taken up again.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    row = torch.zeros(len(samples.names), dtype=torch.int64)
    for number, (height, width) in enumerate(sizes):
        members = [i for i, bucket in enumerate(samples.buckets) if bucket == number]
        if members:
            tensors[f"latents.{height}x{width}"] = torch.stack([samples.latents[i] for i in members])
            row[members] = torch.arange(len(members))
    tensors |= {"bucket": torch.tensor(samples.buckets, dtype=torch.int64), "row": row}
    tensors["names"], tensors["name_ends"] = packed(samples.names)
    tensors["captions"], tensors["caption_ends"] = packed(samples.captions)
    pixels = [latent.double().flatten(1) for latent in samples.latents]
    sums = {
        "number": sum(x.shape[1] for x in pixels),
        "sum": sum((x.sum(1) for x in pixels), torch.zeros(1)).tolist(),
        "squares": sum((x.square().sum(1) for x in pixels), torch.zeros(1)).tolist(),
    }
    write_shard(file, tensors, {"made_with": made_with, "skipped": list(samples.skipped), "statistics": sums})


def latent_shard_entry(file: Path, made_with: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what the manifest says of a shard, every byte of it verified.

    Args:
        file: the shard.
        made_with: what it has to be made with.
        names: of the samples that it has to be of, good and bad, in order; None where they are not known.

    Raises:
        ShardDamaged: it is not there, or not what was written.
        UserError: it was made with something else, or of other samples.
    """
    tensors, about = verified_shard(file)
    check_made_with(file, about["made_with"], made_with)
    number = len(tensors["bucket"])
    stored = [unpacked(tensors["names"], tensors["name_ends"], i) for i in range(number)]
    for place, name, _ in about["skipped"]:
        stored.insert(place, name)
    if names is not None and stored != list(names):
        raise UserError(f"{file} is of other samples than the source has there now: encode into an empty folder")
    return {
        "file": file.name,
        "samples": number,
        "bytes": file.stat().st_size,
        "sha256": sha256_of(file),
        "skipped": about["skipped"],
        "statistics": about["statistics"],
    }


def check_made_with(file: Path, made_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a shard that was made otherwise than the run at hand would make it.

    Raises:
        UserError: it was; the first field that differs is named.
    """
    for field, value in json.loads(json.dumps(wanted)).items():
        if made_with.get(field) != value:
            raise UserError(
                f"{file} was made with {field}={made_with.get(field)!r}, and this run has {value!r}: encode into "
                "another folder, or set it back"
            )


class LatentShards:
    """The latents of a folder, by sample number; mapped into memory, so that nothing is read before it is needed.

    Args:
        folder: what ``latteflow encode`` wrote.
        expected: what they have to be, by the manifest's fields, dotted: ``autoencoder.sha256``, ``size``. None is
            not looked at.

    Raises:
        UserError: they are not complete, a shard is missing or cut short, or a field is not as expected.
    """

    def __init__(self, folder: str | Path, expected: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.require(expected or {})
        self._entries: list[dict[str, Any]] = self.manifest["shards"]
        for entry in self._entries:
            _check_size(self.folder / entry["file"], entry["bytes"])
        self._ends = list(itertools.accumulate(entry["samples"] for entry in self._entries))
        self._opened: dict[int, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
        self.contexts = None
        if "contexts" in self.manifest:
            self.contexts = ContextShards(self.folder, self.manifest["contexts"])

    def require(self, expected: Mapping[str, Any]) -> None:
        """Refuse latents that are not as expected, which is given as to the class.

        Raises:
            UserError: a field is not; it is named.
        """
        for field, wanted in expected.items():
            found = _field(self.manifest, field)
            if wanted is not None and found != json.loads(json.dumps(wanted)):
                raise UserError(
                    f"the latents in {self.folder} have {field}={found!r}, and the recipe asks for {wanted!r}: encode "
                    "anew into another folder, or change the recipe"
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a worker process maps the files for itself

    @property
    def sizes(self) -> list[Size]:
        """Height and width in pixels of each bucket."""
        return [(height, width) for height, width in self.manifest["sizes"]]

    @property
    def mean(self) -> list[float]:
        """Mean a channel of all latents: the replica's ``latents_mean``."""
        return self.manifest["latents_mean"]

    @property
    def std(self) -> list[float]:
        """Spread a channel of all latents: the replica's ``latents_std``."""
        return self.manifest["latents_std"]

    @cached_property
    def buckets(self) -> torch.Tensor:
        """Each sample's bucket, int64 (number,)."""
        parts = [self._shard(number)[0]["bucket"] for number in range(len(self._entries))]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])

    @cached_property
    def good(self) -> torch.Tensor:
        """Which of the source's samples are here, bool (number of the source's samples,): the bad ones are not."""
        if self.manifest.get("bad") == 0:
            return torch.ones(len(self), dtype=torch.bool)
        parts = [torch.zeros(0, dtype=torch.bool)]
        for number, entry in enumerate(self._entries):
            places = [place for place, _, _ in self._shard(number)[1]["skipped"]]
            part = torch.ones(entry["samples"] + len(places), dtype=torch.bool)
            part[places] = False
            parts.append(part)
        return torch.cat(parts)

    def name(self, index: int) -> str:
        """Return what a sample is called in its source."""
        shard, at = self._place(index)
        return unpacked(shard["names"], shard["name_ends"], at)

    def caption(self, index: int) -> str:
        """Return a sample's caption."""
        shard, at = self._place(index)
        return unpacked(shard["captions"], shard["caption_ends"], at)

    def latent(self, index: int) -> torch.Tensor:
        """Return a sample's latent, (channels, height, width), scaled by the autoencoder's factor, as it is kept."""
        shard, at = self._place(index)
        height, width = self.manifest["sizes"][int(shard["bucket"][at])]
        return shard[f"latents.{height}x{width}"][int(shard["row"][at])]

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Return the latents of samples of one bucket, (number, channels, height, width)."""
        return torch.stack([self.latent(i) for i in index.tolist()])

    def verify(self) -> None:
        """Compare every shard with the manifest, byte for byte.

        Raises:
            UserError: one differs; it is named.
        """
        files = [(self.folder / entry["file"], entry["sha256"]) for entry in self._entries]
        files += [] if self.contexts is None else self.contexts.files()
        for file, written in files:
            if sha256_of(file) != written:
                raise UserError(f"{file} is not what was written: its hash differs; delete it and encode again")

    def _place(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self._shard(number)[0], index - (self._ends[number - 1] if number else 0)

    def _shard(self, number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        if number not in self._opened:
            try:
                self._opened[number] = open_shard(self.folder / self._entries[number]["file"])
            except ShardDamaged as error:
                raise UserError(f"{error}: delete it and encode again") from error
        return self._opened[number]


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"no latents in {folder}, or they are not complete: run `latteflow encode RECIPE`")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != 1:
            raise UserError(f"{file} is of format {manifest['format']}, which this version does not know: update it")
        missing = {"autoencoder", "sizes", "latents_mean", "latents_std", "shards"} - set(manifest)
        if missing:
            raise UserError(f"{file} says nothing of {sorted(missing)[0]}: run `latteflow encode` again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read ({error}): run `latteflow encode` again") from error
    return manifest


def _field(manifest: Any, field: str) -> Any:
    for part in field.split("."):
        manifest = manifest.get(part) if isinstance(manifest, dict) else None
    return manifest


def _check_size(file: Path, size: int) -> None:
    if not file.is_file() or file.stat().st_size != size:
        raise UserError(f"{file} is missing or not whole: run `latteflow encode` again, which makes it anew")
