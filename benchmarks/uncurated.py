"""Drawings that nobody chose: held-out captions spread evenly, one seed, each drawing beside the real picture.

    latteflow data emoji
    python benchmarks/uncurated.py --out docs/images/uncurated.png

Needs the data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image

from latteflow import LatteFlowPipeline
from latteflow.data.captioned import load_captioned_images
from latteflow.data.grid import picture_grid
from latteflow.evaluate.embedded import drawings_of, pictures_of_model, pixels_of
from latteflow.models.embedded import resolve_model


def main() -> None:
    """Draw, and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-64")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--number", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pipe = LatteFlowPipeline.from_pretrained(options.model, dtype=torch.float32)
    heldout = load_captioned_images(options.data, "heldout", **pictures_of_model(Path(resolve_model(options.model))))
    part = heldout.spread(options.number)
    drawn = pixels_of(drawings_of(pipe, part, options.seed, num_inference_steps=40, guidance_scale=4.0))
    pairs = rearrange([drawn, part.pixels], "two n c h w -> (n two) c h w")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet: Image.Image = picture_grid(pairs.float() / 127.5 - 1, columns=16)
    sheet.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
