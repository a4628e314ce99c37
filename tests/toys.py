"""Toy parts for tests: everything that a pipeline and a training run need, in sizes that take milliseconds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image, ImageDraw
from pyarrow import parquet
from torch import nn

from latteflow.flow.schedulers import make_scheduler
from latteflow.models.autoencoder import small_autoencoder
from latteflow.models.backbones.small_qwen2_vl import small_backbone, small_processor, train_tokenizer
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.samples import Samples

SIZE = 32
PATCH = 8
COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 60, 220)}
SHAPES = {"circle": "round", "square": "angular", "triangle": "angular", "cross": "angular"}
STYLES = ("solid", "outline", "tiny")
HELD_OUT = {("blue circle", "tiny"), ("red square", "outline"), ("green cross", "solid")}
SENTENCES = [
    "What is this?",
    "Which style is this?",
    "an emoji of a red circle drawn in solid style",
    "the green square, outline style",
    "a blue triangle",
    "Describe this picture.",
    "yes",
    "no",
] * 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def shake(module: nn.Module, generator: torch.Generator, scale: float = 0.1) -> nn.Module:
    """Perturb every parameter: what starts at zero or one no longer hides a mistake."""
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.add_(scale * noise.to(parameter.dtype))
    return module


def toy_tokenizer() -> Any:
    return train_tokenizer(SENTENCES, vocabulary=320)


def toy_processor(tokenizer: Any = None) -> Any:
    return small_processor(tokenizer or toy_tokenizer(), picture_size=SIZE, patch_size=PATCH)


def toy_backbone(tokenizer: Any = None, *, num_layers: int = 4, seed: int = 0) -> Any:
    """A Qwen2-VL of hidden size 32 with grouped-query attention, every weight and bias away from its start."""
    torch.manual_seed(seed)
    backbone = small_backbone(
        tokenizer or toy_tokenizer(),
        hidden_size=32,
        intermediate_size=48,
        num_layers=num_layers,
        num_heads=2,
        num_key_value_heads=1,
        vision_depth=1,
        vision_width=32,
        vision_heads=2,
        patch_size=PATCH,
    )
    shake(backbone, seeded(seed + 1), 0.05)
    return backbone.requires_grad_(False).eval()


def toy_vae(seed: int = 0) -> Any:
    """Pictures of 32x32 to latents of 4 channels and 4x4."""
    torch.manual_seed(seed)
    vae = small_autoencoder(latent_channels=4, widths=(8, 8, 16, 16), layers=(0, 1, 1, 1))
    return vae.requires_grad_(False).eval()


def toy_transformer(backbone: nn.Module, num_groups: int = 2, *, shaken: bool = True, **settings: Any) -> Any:
    """The replica of a toy backbone; shaken, because gates, modulation and head start at zero."""
    torch.manual_seed(0)
    defaults = {"latent_channels": 4, "sample_size": 4, "time_embedding_size": 16}
    replica = LatteFlowTransformer.from_backbone(backbone, num_groups=num_groups, **{**defaults, **settings})
    return shake(replica, seeded(2)) if shaken else replica


def toy_pipeline(num_groups: int = 2, *, num_layers: int = 4, scheduler: str = "euler", **settings: Any) -> Any:
    tokenizer = toy_tokenizer()
    backbone = toy_backbone(tokenizer, num_layers=num_layers)
    settings = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0], **settings}
    pipe = LatteFlowPipeline(
        backbone,
        toy_processor(tokenizer),
        toy_transformer(backbone, num_groups, **settings),
        toy_vae(),
        make_scheduler(scheduler),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def toy_picture(shape: str, colour: str, style: str, size: int = SIZE) -> Image.Image:
    """A coloured shape on white."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    inset = size // 3 if style == "tiny" else size // 8
    low, high = inset, size - 1 - inset
    fill, outline = (None, COLOURS[colour]) if style == "outline" else (COLOURS[colour], None)
    middle = size // 2
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=fill, outline=outline, width=2)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=fill, outline=outline, width=2)
    elif shape == "triangle":
        draw.polygon([(middle, low), (high, high), (low, high)], fill=fill, outline=outline, width=2)
    else:
        draw.line((low, low, high, high), fill=COLOURS[colour], width=2 if style == "outline" else 6)
        draw.line((low, high, high, low), fill=COLOURS[colour], width=2 if style == "outline" else 6)
    return image


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def toy_rows() -> list[dict[str, Any]]:
    """One row a picture, in the columns of the emoji set: 12 concepts in 3 styles, and one of dark tone a style."""
    rows = []
    for style in STYLES:
        for number, (shape, colour) in enumerate((shape, colour) for shape in SHAPES for colour in COLOURS):
            label = f"{colour} {shape}"
            for tone in ("none", "dark") if label == "red circle" else ("none",):
                rows.append(
                    {
                        "image": {"bytes": png_bytes(toy_picture(shape, colour, style)), "path": None},
                        "concept": f"{number:04x}",
                        "label": label,
                        "names": [label, f"{shape} of {colour}"],
                        "tags": [colour] if shape != "cross" else [],
                        "group": SHAPES[shape],
                        "subgroup": shape,
                        "style": style,
                        "skin_tone": tone,
                        "codepoints": f"{number:04x}" + ("-1f3ff" if tone == "dark" else ""),
                        "twins": number,
                    }
                )
    return rows


def write_toy_set(folder: Path) -> Path:
    """Write the toy set as ``train-*.parquet`` (two shards) and ``heldout-*.parquet``; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = toy_rows()
    heldout = [row for row in rows if (row["label"], row["style"]) in HELD_OUT]
    train = [row for row in rows if (row["label"], row["style"]) not in HELD_OUT]
    write_rows(folder / "train-00000-of-00002.parquet", train[:20])
    write_rows(folder / "train-00001-of-00002.parquet", train[20:])
    write_rows(folder / "heldout-00000-of-00001.parquet", heldout)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    text = pa.string()
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", text)])), ("concept", text), ("label", text)]
        + [("names", pa.list_(text)), ("tags", pa.list_(text)), ("group", text), ("subgroup", text), ("style", text)]
        + [("skin_tone", text), ("codepoints", text), ("twins", pa.int64())]
    )
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), file)


def toy_recipe(stage: str, output: Path, data: Path, *, parts: Path | None = None, **train: Any) -> dict[str, Any]:
    """A recipe of seconds as plain values; ``parts`` holds the frozen parts of the generator stage."""
    settings: dict[str, Any] = {
        "steps": 20,
        "batch_size": 6,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "mixed_precision": "no",
        "log_every": 5,
        "preview_every": 10,
        "checkpoint_every": 10,
        "tracker": "none",
        "cpu_threads": 1,
    }
    sections: dict[str, dict[str, Any]] = {
        "autoencoder": {"latent_channels": 4, "widths": [8, 8, 16, 16], "layers": [0, 1, 1, 1]},
        "backbone": {
            "vocabulary": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "vision_depth": 1,
            "vision_width": 32,
            "vision_heads": 2,
            "patch_size": PATCH,
        },
        "generator": {
            "autoencoder": f"{parts}/autoencoder",
            "backbone": f"{parts}/backbone",
            "num_groups": 2,
            "time_embedding_size": 16,
            "captions_per_image": 2,
            "preview_prompts": ["a red circle, solid style"],
        },
    }
    return {
        "stage": stage,
        "output": str(output),
        "data": {"path": str(data)},
        "train": {**settings, **train},
        stage: sections[stage],
    }


def save_parts(folder: Path) -> Path:
    """Write a toy autoencoder, and a toy backbone with its processor, as the first two stages leave them."""
    tokenizer = toy_tokenizer()
    toy_vae().save_pretrained(folder / "autoencoder")
    toy_backbone(tokenizer).save_pretrained(folder / "backbone")
    toy_processor(tokenizer).save_pretrained(folder / "backbone")
    return folder


def samples_of(index, seed=0, step=0):
    """A whole batch of given samples."""
    return Samples(index, torch.arange(len(index)), len(index), len(index), seed, step)
