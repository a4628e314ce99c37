"""Pictures by the ten thousand: drawn in shards that any number of processes make, and make only once.

Picture i shows prompt i modulo their number and starts from the noise of ``seed + i``, so that `latteflow generate
PROMPT --seed` draws it alone. It is always drawn in the same batch: shards, processes and interruptions change no bit.
On another device, or with another batch size or number of threads, a picture may differ by rounding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from latteflow.data.shards import (
    ShardDamaged,
    open_shard,
    remove_partial,
    tensors_sha256,
    verified_shard,
    write_json,
    write_shard,
)
from latteflow.errors import UserError
from latteflow.evaluate.picture_arrays import write_pictures
from latteflow.models.quantization import quantization_of
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.encode_parts import device_named
from latteflow.train.encode_ray import having_ray, run_on_ray

_SET = "samples.json"
_log = logging.getLogger(__name__)


@dataclass
class SampleWork:
    """What is drawn, and how. Goes to other processes as it is; each loads the model for itself.

    Attributes:
        folder: where shards are written.
        model: an embedded model, a folder or a hub id.
        prompts: picture i shows prompt i modulo their number: one each, or class names in turns (``balanced``).
        number: pictures in all. More may be asked for later; what is there stays.
        steps: network calls a picture.
        guidance_scale: 1 is without guidance.
        seed: of the set; those of sets that are to share no noise are ``number`` apart.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        size: height and width in pixels; None for the model's own.
        batch_size: pictures at a time.
        shard_size: pictures a file, a multiple of ``batch_size``.
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: there is nothing to draw, or shards cannot be cut so.
    """

    folder: Path
    model: str
    prompts: Sequence[str]
    number: int
    steps: int = 40
    guidance_scale: float = 4.0
    seed: int = 0
    dtype: str = "float32"
    size: tuple[int, int] | None = None
    batch_size: int = 50
    shard_size: int = 500
    device: str = "auto"
    _pipe: Any = field(default=None, repr=False)
    _made_with: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if not self.prompts or self.number < 1:
            raise UserError(f"{self.number} pictures of {len(self.prompts)} prompts: give at least one of each")
        if self.batch_size < 1 or self.shard_size < 1 or self.shard_size % self.batch_size:
            raise UserError(
                f"shard_size={self.shard_size} is no multiple of batch_size={self.batch_size}: batches, and with them "
                "the last bits of pictures, must not depend on shards"
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"there is no dtype {self.dtype!r}: give float32, bfloat16 or float16")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipe": None, "_made_with": {}}

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(math.ceil(self.number / self.shard_size))

    @property
    def made_with(self) -> dict[str, Any]:
        """What pictures depend on, once the model is loaded."""
        return self._made_with

    def load(self, pipe: LatteFlowPipeline | None = None, device: torch.device | None = None) -> None:
        """Load the model, or take the one that is there, as it is, onto a device; left out, that of ``device``.

        Raises:
            UserError: it cannot be loaded, or its weights are quantised, which have no identity that shards can keep.
        """
        device = device or device_named(self.device)
        if pipe is None:
            pipe = LatteFlowPipeline.from_pretrained(self.model, dtype=getattr(torch, self.dtype))
            pipe.set_progress_bar_config(disable=True)
        if quantization_of(pipe.backbone, pipe.transformer):
            raise UserError("samples are drawn from weights as they are: load the model without quantisation")
        self._pipe = pipe.to(device)
        parts = {"backbone": pipe.backbone, "transformer": pipe.transformer, "vae": pipe.vae}
        weights = {name: tensors_sha256(part.state_dict()) for name, part in parts.items()}
        self._made_with = {
            "model": self.model,
            "weights": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
            "prompts": hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest(),
            "steps": self.steps,
            "guidance_scale": float(self.guidance_scale),
            "scheduler": type(pipe.scheduler).__name__,
            "seed": self.seed,
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            "size": list(self.size) if self.size else None,
            "batch_size": self.batch_size,
            "shard_size": self.shard_size,
            "device": device.type,
        }

    def written(self, number: int) -> bool:
        """Return whether a shard is there, every byte verified.

        Raises:
            UserError: it was made otherwise.
        """
        file = _shard_file(self.folder, number)
        if not file.exists():
            return False
        try:
            tensors, about = verified_shard(file)
        except ShardDamaged as damage:
            _log.warning("%s: it is made anew", damage)
            return False
        _check_made_with(file, about["made_with"], self._made_with)
        # The last shard of a smaller number is drawn anew: its pictures are the first of the new one's.
        return len(tensors["pictures"]) == len(self._range(number))

    def __call__(self, number: int) -> dict[str, Any]:
        """Write a shard, unless it is there, and return how many pictures it holds.

        Raises:
            UserError: it is there, made otherwise, or a picture is not finite.
        """
        if not self.written(number):
            pictures = torch.cat([self._batch(batch) for batch in _cut(self._range(number), self.batch_size)])
            write_shard(_shard_file(self.folder, number), {"pictures": pictures}, {"made_with": self._made_with})
        return {"shard": number, "pictures": len(self._range(number))}

    def _range(self, number: int) -> range:
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, self.number))

    @torch.no_grad()
    def _batch(self, indices: range) -> torch.Tensor:
        """Return pictures, uint8 (number, 3, height, width); ``indices`` begin at a multiple of ``batch_size``."""
        height, width = self.size or (None, None)
        found = self._pipe(
            [self.prompts[i % len(self.prompts)] for i in indices],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(self.seed + i) for i in indices],
            height=height,
            width=width,
            output_type="pt",
        ).images
        finite = found.isfinite().flatten(1).all(dim=1)
        if not bool(finite.all()):
            first = indices[int(finite.logical_not().nonzero()[0])]
            raise UserError(f"picture {first} is not finite in {self.dtype}: draw it in another dtype")
        return (found.float() * 255).round().to(torch.uint8).cpu()


def balanced(names: Sequence[str], number: int, template: str = "{}") -> list[str]:
    """Return the prompts of classes, of which ``number`` pictures show each equally often.

    Args:
        names: of the classes.
        number: of pictures.
        template: what is asked for, with ``{}`` for the name.

    Raises:
        UserError: the classes cannot be shown equally often.
    """
    if not names or number < 1 or number % len(names):
        raise UserError(
            f"{number} pictures cannot show {len(names)} classes equally often: take a multiple of {len(names) or 1}"
        )
    return [template.replace("{}", name) for name in names]


def draw_samples(
    work: SampleWork,
    pipe: LatteFlowPipeline | None = None,
    *,
    backend: Literal["local", "ray"] = "local",
    workers: int = 0,
    share: tuple[int, int] | None = None,
    watch: Callable[[int], None] = lambda pictures: None,
) -> Path:
    """Draw what is not there yet, and return the folder.

    Args:
        work: what is drawn.
        pipe: the model, where it is loaded already; not with Ray.
        backend: "local": in this process, and those that ``accelerate launch`` has started beside it; or "ray": in a
            pool of actors, here or on the cluster that RAY_ADDRESS names.
        workers: Ray's actors; 0 for one a GPU.
        share: this process's number, and how many there are, where they are started by hand; left out, what
            accelerate says. Started by hand, each returns when its own share is done.
        watch: called with a number of pictures as they are done or found, those of other processes left out.

    Raises:
        UserError: shards were made otherwise, a picture is not finite, or the model cannot be loaded.
        OSError: a shard cannot be written.
    """
    if backend == "ray":
        if pipe is not None or share is not None:
            raise UserError("Ray's actors load the model and share the work themselves: leave pipe and share out")
        work.folder.mkdir(parents=True, exist_ok=True)
        with having_ray(workers):
            for entry in run_on_ray(work, list(work.shards), workers=workers, device=work.device):
                watch(entry["pictures"])
        _write_set(work)
        return work.folder
    if workers:
        raise UserError(f'{workers} workers are Ray\'s: give backend="ray", or start processes with accelerate launch')
    state = _processes(work.device) if share is None else None
    rank, processes = share or (0, 1) if state is None else (state.process_index, state.num_processes)
    if not 0 <= rank < processes:
        raise UserError(f"there is no share {rank} of {processes}: they are counted from 0")
    work.folder.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        remove_partial(work.folder)
    work.load(pipe, None if state is None else state.device)
    for number in work.shards[rank::processes]:
        watch(work(number)["pictures"])
    if rank == 0:
        _write_set(work)
    if state is not None:
        state.wait_for_everyone()
    return work.folder


class Samples:
    """The pictures of a folder, all of them there.

    Args:
        folder: what ``draw_samples`` wrote.

    Attributes:
        number: of pictures.
        size: height and width.
        made_with: how they were made: model, weights, steps, guidance_scale, dtype, seed and more.

    Raises:
        UserError: it holds no set, a shard is missing or damaged, or shards were made in different ways.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        about = self.folder / _SET
        if not about.is_file():
            raise UserError(f"{folder} holds no samples: draw them first")
        facts = json.loads(about.read_text(encoding="utf-8"))
        self.number: int = facts["number"]
        self._files = [_shard_file(self.folder, i) for i in range(math.ceil(self.number / facts["shard_size"]))]
        shapes = []
        for place, file in enumerate(self._files):
            tensors, found = self._open(file)
            if place == 0:
                self.made_with: dict[str, Any] = found["made_with"]
            _check_made_with(file, found["made_with"], self.made_with)
            shapes.append(tuple(tensors["pictures"].shape))
        if sum(shape[0] for shape in shapes) != self.number or len({shape[1:] for shape in shapes}) != 1:
            raise UserError(f"{folder} does not hold {self.number} pictures of one size: draw them again")
        self.size: tuple[int, int] = (shapes[0][2], shapes[0][3])

    def chunks(self, batch: int = 64) -> Iterator[torch.Tensor]:
        """Yield all pictures in their order, uint8 (at most ``batch``, 3, height, width)."""
        for file in self._files:
            yield from self._open(file)[0]["pictures"].split(batch)

    def export(self, file: Path) -> None:
        """Write them as the one ``.npz`` that ADM's evaluator reads."""
        write_pictures(Path(file), self.chunks(), self.number)

    def _open(self, file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        try:
            return open_shard(file)
        except ShardDamaged as error:
            raise UserError(f"{file} is missing or damaged: draw again, which makes only what is not there") from error


def _processes(device: str) -> Any:
    """Return accelerate's processes where it has started several, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu")


def _check_made_with(file: Path, made_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if made_with.get(name) != value:
            raise UserError(
                f"{file} was drawn with {name}={made_with.get(name)!r}, and this is {value!r}: draw into another "
                "folder, or set it back"
            )


def _write_set(work: SampleWork) -> None:
    write_json(work.folder / _SET, {"number": work.number, "shard_size": work.shard_size})


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"samples-{number:05d}.safetensors"


def _cut(indices: range, size: int) -> list[range]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
