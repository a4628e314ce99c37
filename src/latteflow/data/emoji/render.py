"""Turning any source picture into 64x64 RGB on white."""

from __future__ import annotations

import io

import resvg_py
from PIL import Image

SIZE = 64
"""Width and height of every picture, in pixels."""

# SVG filters may work on "hard" (not smoothed) alpha, as Fluent's shadings do: drawn at 64 pixels, edges are jagged.
_FILTER_DETAIL = 4

_WHITE = (255, 255, 255, 255)


def on_white(picture: Image.Image) -> Image.Image:
    """``picture`` composited on opaque white, mode RGB, same size.

    Done before any resizing: transparent pixels carry arbitrary colours, which a filter would bleed into the edges.
    """
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")


def fit(picture: Image.Image) -> Image.Image:
    """An RGB ``picture`` scaled (LANCZOS) to fit 64x64, its sides' ratio kept, centred on white."""
    if picture.size == (SIZE, SIZE):
        return picture
    scale = SIZE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    if scaled.size == (SIZE, SIZE):
        return scaled
    canvas = Image.new("RGB", (SIZE, SIZE), _WHITE[:3])
    canvas.paste(scaled, ((SIZE - width) // 2, (SIZE - height) // 2))
    return canvas


def render_raster(data: bytes) -> Image.Image:
    """A PNG or WebP file's content as a 64x64 RGB picture on white."""
    with Image.open(io.BytesIO(data)) as picture:
        return fit(on_white(picture))


def render_svg(data: bytes) -> Image.Image:
    """An SVG file's content as a 64x64 RGB picture on white; art that is not square is fitted and centred.

    Raises:
        ValueError: the SVG cannot be rendered.
    """
    text = data.decode("utf-8")
    side = SIZE * _FILTER_DETAIL if "<filter" in text else SIZE
    # System fonts would make the pictures depend on the machine.
    rendered = resvg_py.svg_to_bytes(svg_string=text, width=side, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(rendered))) as picture:
        if picture.height > side:
            rendered = resvg_py.svg_to_bytes(svg_string=text, height=side, skip_system_fonts=True)
    return render_raster(bytes(rendered))


def encode_png(picture: Image.Image) -> bytes:
    """``picture`` as PNG bytes, without metadata: the same pixels give the same bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()
