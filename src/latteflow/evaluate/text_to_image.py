"""Pictures of public prompt sets, in the folders that their scorers read: GenEval (arXiv 2310.11513), DPG (2403.05135).

The noise of picture i of a prompt follows from the seed, the prompt and i alone, whatever else is drawn. A folder can
be left half done: pictures that are there and whole are kept. Every file says how it was drawn, and a folder that holds
pictures drawn in another way is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latteflow import __version__
from latteflow.errors import UserError
from latteflow.models.request import check_sampling
from latteflow.pipeline import LatteFlowPipeline

PICTURES = 4
"""A prompt: GenEval's number, and what fills DPG's grid of 2 x 2."""


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; every file of them says so."""

    model: str
    """As the user named it."""
    seed: int = 0
    steps: int = 40
    guidance_scale: float = 4.0
    height: int | None = None
    """In pixels; left out, the model's own."""
    width: int | None = None

    def check(self) -> None:
        """Refuse settings that cannot be.

        Raises:
            UserError: steps or guidance out of range.
        """
        check_sampling(self.steps, self.guidance_scale, (0.0, 1.0), 1)


def picture_seed(seed: int, prompt: str, number: int) -> int:
    """Return the seed of picture ``number`` of a prompt: 63 bits that nothing else decides."""
    digest = hashlib.sha256(json.dumps([seed, prompt, number]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_prompt(pipe: LatteFlowPipeline, prompt: str, pictures: int, drawing: Drawing) -> list[Image.Image]:
    """Return the pictures of one prompt, drawn in one call.

    Args:
        pipe: the model.
        prompt: in words.
        pictures: how many.
        drawing: in which way.
    """
    generators = [torch.Generator().manual_seed(picture_seed(drawing.seed, prompt, i)) for i in range(pictures)]
    images = pipe(
        prompt,
        num_images_per_prompt=pictures,
        generator=generators,
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance_scale,
        height=drawing.height,
        width=drawing.width,
    ).images
    return list(images)


def read_geneval_prompts(file: Path) -> list[dict[str, Any]]:
    """Return the lines of GenEval's ``evaluation_metadata.jsonl``, each with its ``prompt`` and ``tag``.

    Raises:
        UserError: there is no such file, it is empty, or a line is not GenEval's.
    """
    if not file.is_file():
        raise UserError(f"no {file}: give GenEval's prompts/evaluation_metadata.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(one, dict) or not all(
            isinstance(one.get(key), str) and one[key] for key in ("prompt", "tag")
        ):
            raise UserError(f"{file}, line {number}: an object with a prompt and a tag is wanted")
        found.append(one)
    if not found:
        raise UserError(f"{file} holds no prompts")
    return found


def read_dpg_prompts(folder: Path) -> dict[str, str]:
    """Return DPG's prompts by the names of their files, in order.

    Raises:
        UserError: the folder holds no ``.txt`` files, or one is empty.
    """
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise UserError(f"no .txt files in {folder}: give DPG's dpg_bench/prompts")
    prompts = {file.stem: file.read_text(encoding="utf-8").strip() for file in files}
    for name, prompt in prompts.items():
        if not prompt:
            raise UserError(f"{folder / name}.txt is empty: a prompt is wanted")
    return prompts


def draw_geneval(
    pipe: LatteFlowPipeline,
    prompts: Path,
    folder: Path,
    drawing: Drawing,
    *,
    pictures: int = PICTURES,
    watch: Callable[[str], None] = lambda message: None,
) -> int:
    """Draw GenEval's prompts: ``<folder>/00000/metadata.jsonl`` and ``<folder>/00000/samples/0000.png``, and so on.

    Args:
        pipe: the model.
        prompts: GenEval's ``evaluation_metadata.jsonl``.
        folder: made where it is missing.
        drawing: in which way.
        pictures: a prompt.
        watch: told before each prompt that is drawn.

    Returns:
        How many prompts were drawn; the others were there.

    Raises:
        UserError: a prompt file that is none, settings that cannot be, or pictures there that were drawn otherwise.
    """
    drawing.check()
    if pictures < 1:
        raise UserError(f"at least one picture a prompt is wanted: got {pictures}")
    lines, drawn = read_geneval_prompts(prompts), 0
    for number, line in enumerate(lines):
        place = folder / f"{number:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        (place / "metadata.jsonl").write_text(json.dumps(line), encoding="utf-8")
        files = [place / "samples" / f"{i:04d}.png" for i in range(pictures)]
        records = [_record(drawing, line["prompt"], i) for i in range(pictures)]
        there = [_is_drawn(file, record) for file, record in zip(files, records, strict=True)]
        if all(there):
            continue
        watch(f"{number + 1} of {len(lines)}: {line['prompt']}")
        images = draw_prompt(pipe, line["prompt"], pictures, drawing)
        for image, file, record, kept in zip(images, files, records, there, strict=True):
            if not kept:
                _write(image, file, record, folder)
        drawn += 1
    return drawn


def draw_dpg(
    pipe: LatteFlowPipeline,
    prompts: Path,
    folder: Path,
    drawing: Drawing,
    *,
    watch: Callable[[str], None] = lambda message: None,
) -> int:
    """Draw DPG's prompts: one PNG each, named like the prompt's file, of four pictures in two rows.

    Args:
        pipe: the model.
        prompts: DPG's folder of ``.txt`` files.
        folder: made where it is missing; the scorer takes every file in it for a picture.
        drawing: in which way.
        watch: told before each prompt that is drawn.

    Returns:
        How many prompts were drawn; the others were there.

    Raises:
        UserError: no prompts there, settings that cannot be, or pictures there that were drawn otherwise.
    """
    drawing.check()
    found, drawn = read_dpg_prompts(prompts), 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, prompt) in enumerate(found.items()):
        file, record = folder / f"{name}.png", _record(drawing, prompt, None)
        if _is_drawn(file, record):
            continue
        watch(f"{number + 1} of {len(found)}: {prompt}")
        _write(_two_by_two(draw_prompt(pipe, prompt, PICTURES, drawing)), file, record, folder)
        drawn += 1
    return drawn


def _two_by_two(images: Sequence[Image.Image]) -> Image.Image:
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, image in enumerate(images):
        grid.paste(image, (number % 2 * width, number // 2 * height))
    return grid


def _record(drawing: Drawing, prompt: str, number: int | None) -> dict[str, str]:
    """Return what a file says of itself; a grid of four has no number."""
    seed = drawing.seed if number is None else picture_seed(drawing.seed, prompt, number)
    facts = {"prompt": prompt, "seed": seed, "steps": drawing.steps, "guidance": drawing.guidance_scale}
    size = {"height": drawing.height or "the model's", "width": drawing.width or "the model's"}
    return {key: str(value) for key, value in {**facts, **size, "model": drawing.model}.items()}


def _is_drawn(file: Path, record: dict[str, str]) -> bool:
    """Return whether the picture is there, whole.

    Raises:
        UserError: it is there, and was drawn in another way.
    """
    if not file.is_file():
        return False
    try:
        with Image.open(file) as image:
            image.load()
            said = {key: image.info.get(key) for key in record}
    except (OSError, SyntaxError):
        return False
    for key, value in record.items():
        if said[key] != value:
            raise UserError(
                f"{file} was drawn otherwise ({key} {said[key]!r:.60}, not {value!r:.60}): give another folder"
            )
    return True


def _write(image: Image.Image, file: Path, record: dict[str, str], folder: Path) -> None:
    """Write a PNG under another name first, beside ``folder``: scorers take what they find inside for pictures."""
    info = PngInfo()
    for key, value in {**record, "software": f"latteflow {__version__}"}.items():
        info.add_itxt(key, value)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    image.save(partial, format="PNG", pnginfo=info)
    os.replace(partial, file)
