"""``latteflow generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latteflow.cli.model import (
    DEFAULT_MODEL,
    CompileOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    QuantizeOption,
    asked_weights,
    load_pipeline,
)
from latteflow.cli.pictures import save_picture
from latteflow.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

_MOST_IMAGES = 1024


def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw, such as 'a slice of pizza, noto style'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG file; several pictures get -0, -1, ... added.")],
    model: ModelOption = DEFAULT_MODEL,
    seed: Annotated[int, typer.Option(help="Picture i is drawn from seed + i.")] = 0,
    num_images: Annotated[int, typer.Option(help="Pictures a prompt.")] = 1,
    steps: Annotated[int, typer.Option(help="Calls of the network a picture.")] = 40,
    guidance: Annotated[float, typer.Option(help="1 is none; higher follows the prompt more closely.")] = 4.0,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels; left out, the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; left out, the model's own.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="euler, heun, dpm++ or unipc; left out, the model's.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="All pictures in one file, a row a prompt.")] = False,
    scale: Annotated[int, typer.Option(help="Enlarge the pixels this many times.")] = 1,
    compiled: CompileOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Draw pictures from prompts."""
    _check(prompts, out, seed, num_images, scale)
    files = [out] if grid else _files(out, len(prompts) * num_images)
    pipe = load_pipeline(model, device, dtype, quantize, compiled=compiled)
    if scheduler is not None:
        from latteflow.flow.schedulers import make_scheduler

        pipe.scheduler = make_scheduler(scheduler)
    import torch

    pipe.set_progress_bar_config(disable=None)  # shown on a terminal alone
    images: list[Image.Image] = pipe(
        prompts,
        negative,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=num_images,
        generator=torch.Generator().manual_seed(seed),
    ).images  # type: ignore[assignment]
    settings = {"steps": steps, "guidance": guidance, "model": model, "negative_prompt": negative or ""}
    settings |= asked_weights(dtype, quantize)
    if grid:
        records = [{"prompt": " | ".join(prompts), "seed": seed, **settings}]
        images = [_grid(images, num_images)]
    else:
        records = [
            {"prompt": prompts[i // num_images], "seed": seed + i, **settings} for i in range(len(prompts) * num_images)
        ]
    for file, image, record in zip(files, images, records, strict=True):
        save_picture(_enlarged(image, scale), file, record)
        print(file)


def _check(prompts: list[str], out: Path, seed: int, num_images: int, scale: int) -> None:
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty: say what to draw, such as 'a slice of pizza, noto style'")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} does not end in .png: pictures are written as PNG, with their settings inside")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed has to be 0 to 2**63 - 1: got {seed}")
    if not 1 <= num_images * len(prompts) <= _MOST_IMAGES or num_images < 1:
        raise UserError(f"--num-images {num_images}: 1 to {_MOST_IMAGES} pictures in all")
    if not 1 <= scale <= 64:
        raise UserError(f"--scale has to be 1 to 64: got {scale}")


def _files(out: Path, number: int) -> list[Path]:
    return [out] if number == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(number)]


def _grid(images: list[Image.Image], columns: int) -> Image.Image:
    from PIL import Image

    width, height = images[0].size
    if len(images) == columns or columns > 1:
        rows = len(images) // columns
    else:  # one picture a prompt: side by side reads better than one below the other
        columns, rows = len(images), 1
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    from PIL import Image

    return image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS) if scale > 1 else image
