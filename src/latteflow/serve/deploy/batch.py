"""Pictures by the list: a file of prompts becomes folders of PNGs, drawn by any number of workers, and only once.

Rows are cut into shards. A shard is a folder that is complete or not there: it is written under another name, then
renamed, and holds the hash of each of its pictures. So a run that was killed is started again, and goes on. A picture
depends on its row, its shard's other rows and the settings, never on who drew it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from latteflow.data.shards import remove_partial, sha256_of, sync, tensors_sha256, write_json
from latteflow.errors import UserError
from latteflow.models.picture_record import png_text
from latteflow.serve.deploy.prompt_rows import BadRow, PromptRow
from latteflow.serve.loading import asked_weights, load_pipeline
from latteflow.train.encode_ray import having_ray, run_on_ray

_ABOUT = "shard.json"
_BAD = "bad-rows.json"
_log = logging.getLogger(__name__)


@dataclass
class BatchWork:
    """What is drawn, and how. Goes to other processes as it is; each loads the model for itself.

    Attributes:
        folder: where shards are written; the same path on every machine.
        rows: a picture each.
        model: an embedded model, a folder or a hub id.
        steps: network calls a picture.
        guidance_scale: 1 is without guidance.
        device: left out, CUDA where there is one, else the CPU.
        dtype: of the weights; left out, float32 on the CPU and for embedded models, else bfloat16.
        batch_size: pictures at a time.
        shard_size: rows a folder, a multiple of ``batch_size``.

    Raises:
        UserError: there is nothing to draw, or shards cannot be cut so.
    """

    folder: Path
    rows: Sequence[PromptRow]
    model: str = "emoji-64"
    steps: int = 40
    guidance_scale: float = 4.0
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 16
    shard_size: int = 256
    _pipe: Any = field(default=None, repr=False)
    _made_with: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError("there is no row to draw: give prompts")
        if self.batch_size < 1 or self.shard_size < 1 or self.shard_size % self.batch_size:
            raise UserError(
                f"a shard of {self.shard_size} is no multiple of a batch of {self.batch_size}: give one that is"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipe": None, "_made_with": {}}

    @property
    def shards(self) -> list[int]:
        """The numbers of the shards; rows keep theirs, whichever others are bad."""
        return sorted({row.row // self.shard_size for row in self.rows})

    def load(self) -> None:
        """Load the model.

        Raises:
            UserError: it cannot be loaded.
        """
        self._pipe = pipe = load_pipeline(self.model, self.device, self.dtype)
        parts = {"backbone": pipe.backbone, "transformer": pipe.transformer, "vae": pipe.vae}
        weights = {name: tensors_sha256(part.state_dict()) for name, part in parts.items()}
        self._made_with = {
            "weights": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
            "steps": self.steps,
            "guidance_scale": float(self.guidance_scale),
            "scheduler": type(pipe.scheduler).__name__,
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            "device": pipe.device.type,
            "batch_size": self.batch_size,
        }

    def __call__(self, shard: int) -> dict[str, Any]:
        """Write a shard, unless it is there, and return its number and how many pictures it holds.

        Raises:
            UserError: it is there, made otherwise, or something cannot be drawn.
            OSError: it cannot be written.
        """
        rows = [row for row in self.rows if row.row // self.shard_size == shard]
        folder = self.folder / f"{shard:05d}"
        about = {"made_with": self._made_with, "rows": [asdict(row) for row in rows]}
        if not _written(folder, about):
            self._write(folder, rows, about)
        return {"shard": shard, "pictures": len(rows)}

    def _write(self, folder: Path, rows: Sequence[PromptRow], about: dict[str, Any]) -> None:
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for start in range(0, len(rows), self.batch_size):
                self._draw(partial, rows[start : start + self.batch_size])
            files = {file.name: sha256_of(file) for file in sorted(partial.iterdir())}
            write_json(partial / _ABOUT, {**about, "files": files})
            sync(partial)
            shutil.rmtree(folder, ignore_errors=True)  # there is none, or a damaged one
            os.replace(partial, folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @torch.no_grad()
    def _draw(self, folder: Path, rows: Sequence[PromptRow]) -> None:
        images = self._pipe(
            [row.prompt for row in rows],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(row.seed) for row in rows],
        ).images
        common = {"steps": self.steps, "guidance": self.guidance_scale, "negative_prompt": ""}
        common["model"] = Path(self.model).resolve().name if Path(self.model).exists() else self.model
        common |= asked_weights(self.dtype, None)
        for row, image in zip(rows, images, strict=True):
            file = folder / f"{row.row:08d}.png"
            image.save(file, format="PNG", pnginfo=png_text({"prompt": row.prompt, "seed": row.seed, **common}))
            sync(file)


def draw_batch(
    work: BatchWork,
    bad: Sequence[BadRow] = (),
    *,
    on_ray: bool = False,
    workers: int = 0,
    watch: Callable[[int], None] = lambda pictures: None,
) -> Path:
    """Draw what is not there yet, and return the folder.

    Args:
        work: what is drawn.
        bad: rows that are left out; they are listed in ``bad-rows.json``.
        on_ray: whether in a pool of actors, here or on the cluster that RAY_ADDRESS names, in place of this process.
        workers: Ray's actors; 0 for one a GPU, or one where there is none.
        watch: called with a number of pictures as they are done or found.

    Raises:
        UserError: shards were made otherwise, something cannot be drawn, or the model cannot be loaded.
        OSError: a shard cannot be written.
    """
    if workers and not on_ray:
        raise UserError(f"{workers} workers are Ray's: ask for Ray too, or leave them out")
    work.folder.mkdir(parents=True, exist_ok=True)
    remove_partial(work.folder)
    write_json(work.folder / _BAD, [asdict(row) for row in bad])
    if on_ray:
        with having_ray(workers):
            for entry in run_on_ray(work, work.shards, workers=workers, device=_kind(work.device)):
                watch(entry["pictures"])
        return work.folder
    work.load()
    for shard in work.shards:
        watch(work(shard)["pictures"])
    return work.folder


def _written(folder: Path, about: dict[str, Any]) -> bool:
    """Return whether a shard is there, every byte verified.

    Raises:
        UserError: it was made otherwise.
    """
    try:
        found = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        files, made = found["files"], {name: found[name] for name in about}
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        _log.warning("%s cannot be read: the shard is made anew", folder / _ABOUT)
        return False
    if made != about:
        raise UserError(f"{folder} was drawn from other rows or with other settings: draw into another folder")
    whole = all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in files.items())
    if not whole:
        _log.warning("%s is not what was written: it is made anew", folder)
    return whole


def _kind(device: str | None) -> str:
    """Return a device as Ray's pool is told: each of its actors has the first of those it sees."""
    return "auto" if device is None else device.partition(":")[0]
