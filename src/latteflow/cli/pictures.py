"""Pictures from files and to files, for every verb."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from latteflow.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

_MOST_PIXELS = 64_000_000
_MOST_ASPECT = 100
_SIZES = f"at most {_MOST_PIXELS // 10**6} megapixels, no stripes"


def read_picture(file: Path) -> Image.Image:
    """Return a picture from a file, fully read.

    Raises:
        UserError: there is none, it is broken, of another format, or far too large.
    """
    from PIL import Image, UnidentifiedImageError

    if not file.is_file():
        raise UserError(f"no picture {file}: give the path of a PNG, JPEG, WebP, GIF or BMP file")
    try:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large is refused in our words
        with Image.open(file, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP")) as picture:
            width, height = picture.size
            if width * height > _MOST_PIXELS or max(width, height) > _MOST_ASPECT * min(width, height):
                raise UserError(f"{file} is {width}x{height}: {_SIZES}")
            picture.load()
            return picture.copy()
    except Image.DecompressionBombError as error:
        raise UserError(f"{file} is far too large: {_SIZES}") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(
            f"{file} cannot be read as a picture: give an intact PNG, JPEG, WebP, GIF or BMP file"
        ) from error


def save_picture(image: Image.Image, file: Path, record: dict[str, object]) -> None:
    """Write a PNG with its settings as text chunks: under another name first, so that no half file is left.

    Raises:
        UserError: the file cannot be written.
    """
    from latteflow.models.picture_record import png_text

    partial = file.with_name(f".{file.name}.partial")
    try:
        image.save(partial, format="PNG", pnginfo=png_text(record))
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written: {error}") from error
