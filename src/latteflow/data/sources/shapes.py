"""Coloured shapes with captions, drawn on the spot: a source without a file, to try a recipe or measure a machine."""

from __future__ import annotations

from itertools import product

from PIL import Image, ImageDraw

from latteflow.data.sources.source import Sample

COLOURS = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 210, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (140, 60, 180),
    "black": (20, 20, 20),
    "grey": (140, 140, 140),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"": 0.0, "small ": 0.25}


class Shapes:
    """Every colour, shape and size once, in a fixed order.

    Args:
        size: pixels a side.
    """

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._all = list(product(PLACES, COLOURS, SHAPES))

    def __len__(self) -> int:
        return len(self._all)

    def name(self, index: int) -> str:
        """Return the caption, which says all there is."""
        small, colour, shape = self._all[index]
        return f"{small}{colour} {shape}"

    def read(self, index: int) -> Sample:
        """Draw one."""
        small, colour, shape = self._all[index]
        return Sample(_drawn(shape, COLOURS[colour], self.size, PLACES[small]), self.name(index))


def _drawn(shape: str, colour: tuple[int, int, int], size: int, inset: float) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    low = size * (0.1 + inset)
    high = size - 1 - low
    middle, thick = (low + high) / 2, (high - low) / 6
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=colour)
    elif shape == "triangle":
        draw.polygon([(middle, low), (high, high), (low, high)], fill=colour)
    else:
        draw.rectangle((low, middle - thick, high, middle + thick), fill=colour)
        draw.rectangle((middle - thick, low, middle + thick, high), fill=colour)
    return image
