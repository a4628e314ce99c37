"""``latteflow ask``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latteflow.cli.model import DEFAULT_MODEL, DeviceOption, DtypeOption, ModelOption, QuantizeOption, load_pipeline
from latteflow.cli.pictures import read_picture
from latteflow.errors import UserError


def ask(
    image: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP, GIF or BMP.")],
    question: Annotated[str, typer.Argument(help="Such as 'What is this?'.")],
    model: ModelOption = DEFAULT_MODEL,
    max_new_tokens: Annotated[int, typer.Option(help="Where a long answer is cut.")] = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Answer a question about a picture."""
    if not question.strip():
        raise UserError("the question is empty: ask something, such as 'What is this?'")
    if not 1 <= max_new_tokens <= 4096:
        raise UserError(f"--max-new-tokens has to be 1 to 4096: got {max_new_tokens}")
    picture = read_picture(image)
    pipe = load_pipeline(model, device, dtype, quantize)
    print(pipe.ask(picture, question, max_new_tokens=max_new_tokens))
