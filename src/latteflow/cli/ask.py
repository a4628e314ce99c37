"""``latteflow ask``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latteflow.cli.model import DEFAULT_MODEL, DeviceOption, ModelOption, load_pipeline
from latteflow.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

_MOST_PIXELS = 64_000_000
_MOST_ASPECT = 100
_SIZES = f"at most {_MOST_PIXELS // 10**6} megapixels, no stripes"


def ask(
    image: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP, GIF or BMP.")],
    question: Annotated[str, typer.Argument(help="Such as 'What is this?'.")],
    model: ModelOption = DEFAULT_MODEL,
    max_new_tokens: Annotated[int, typer.Option(help="Where a long answer is cut.")] = 64,
    device: DeviceOption = None,
) -> None:
    """Answer a question about a picture."""
    if not question.strip():
        raise UserError("the question is empty: ask something, such as 'What is this?'")
    if not 1 <= max_new_tokens <= 4096:
        raise UserError(f"--max-new-tokens has to be 1 to 4096: got {max_new_tokens}")
    picture = _read_picture(image)
    print(load_pipeline(model, device).ask(picture, question, max_new_tokens=max_new_tokens))


def _read_picture(file: Path) -> Image.Image:
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
