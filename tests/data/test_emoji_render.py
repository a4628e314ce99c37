"""Any picture to 64x64 RGB on white."""

from __future__ import annotations

import io

import emoji_packages as fake
import numpy as np
import pytest
from PIL import Image

from latteflow.data.emoji.render import encode_png, fit, on_white, render_raster, render_svg


def test_transparent_becomes_white_whatever_colour_it_hides() -> None:
    hidden = Image.new("RGBA", (256, 256), (255, 0, 0, 0))
    assert render_raster(fake.encoded(hidden, "PNG")).getcolors() == [(64 * 64, (255, 255, 255))]


def test_half_transparent_is_mixed_with_white() -> None:
    assert on_white(Image.new("RGBA", (1, 1), (255, 0, 0, 51))).getpixel((0, 0)) == (255, 204, 204)


def test_hidden_colour_does_not_bleed_into_edges() -> None:
    image = Image.new("RGBA", (256, 256), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (100, 100, 200, 200))
    pixels = np.asarray(render_raster(fake.encoded(image, "WEBP"))).astype(int)
    # Blue on white has as much red as green everywhere; red from below would show as more red.
    assert int(np.abs(pixels[..., 0] - pixels[..., 1]).max()) <= 1


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (32, 32), (300, 7)])
def test_pictures_are_fitted_and_centred(size: tuple[int, int]) -> None:
    found = np.asarray(fit(Image.new("RGB", size, (0, 0, 0))))
    assert found.shape == (64, 64, 3)
    dark = found[..., 0] < 128
    rows, columns = np.nonzero(dark.any(axis=1))[0], np.nonzero(dark.any(axis=0))[0]
    assert max(len(rows), len(columns)) == 64
    for used in (rows, columns):
        assert abs(int(used[0]) - (63 - int(used[-1]))) <= 1


@pytest.mark.parametrize(("width", "height"), [(8, 8), (16, 8), (8, 16)])
def test_svg_fills_the_longer_side(width: int, height: int) -> None:
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<rect width="{width}" height="{height}"/></svg>'
    )
    found = render_svg(text.encode())
    assert (found.size, found.mode) == ((64, 64), "RGB")
    dark = np.asarray(found)[..., 0] < 128
    assert dark.mean() == min(width, height) / max(width, height)
    assert bool(dark[32, 32])


def test_filters_on_hard_alpha_leave_smooth_edges() -> None:
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><defs><filter id="f">'
        '<feColorMatrix values="0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 127 0"/></filter></defs>'
        '<path filter="url(#f)" d="M4 4 L28 9 L16 28 z"/></svg>'
    )
    found = np.asarray(render_svg(text.encode()))[..., 0]
    assert ((found > 20) & (found < 235)).sum() > 40


def test_a_broken_svg_is_refused() -> None:
    with pytest.raises(ValueError, match="root node"):
        render_svg(b"<svg")


def test_png_is_the_same_twice_and_loses_nothing() -> None:
    image = on_white(fake.picture(3))
    data = encode_png(image)
    assert data == encode_png(image.copy())
    with Image.open(io.BytesIO(data)) as back:
        assert np.array_equal(np.asarray(back), np.asarray(image))


def test_tall_svg_is_drawn_at_its_final_size() -> None:
    text = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 16"><rect x="2" y="4" width="4" height="8"/></svg>'
    found = render_svg(text.encode())
    # Drawn larger and scaled down, its edges would ring.
    assert {color for _, color in found.getcolors() or []} == {(0, 0, 0), (255, 255, 255)}
