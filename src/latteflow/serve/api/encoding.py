"""Pictures to bytes, with what they were drawn from inside."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from latteflow import __version__
from latteflow.models.picture_record import png_text
from latteflow.serve.engine.requests import DrawRequest

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


def encode_picture(
    image: Image.Image, kind: str, quality: int | None, record: Mapping[str, object] | None = None
) -> str:
    """Return a picture's file in base64.

    Args:
        image: RGB.
        kind: png, webp or jpeg.
        quality: of WebP and JPEG, 0 to 100; left out, 90.
        record: what it was drawn from, as ``record_of`` returns it: in PNG as text chunks, elsewhere as EXIF.
    """
    options: dict[str, Any] = {} if kind == "png" else {"quality": 90 if quality is None else quality}
    if record is not None and kind == "png":
        more = {"parameters": parameters(record), "latteflow": _json(record)}
        options["pnginfo"] = png_text({**record, **more})
    elif record is not None:
        exif = Image.Exif()
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + parameters(record).encode("utf-16-be")
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def data_url(encoded: str, kind: str) -> str:
    """Return a picture's file in base64 as a URL that holds it."""
    return f"data:image/{kind};base64,{encoded}"


def record_of(request: DrawRequest, words: str, model: str, weights: Mapping[str, object]) -> dict[str, object]:
    """Return what a picture says of itself, under the names that ``latteflow generate`` uses."""
    return {
        "prompt": words,
        "seed": request.seed,
        "steps": request.num_inference_steps,
        "guidance": request.guidance_scale,
        "model": model,
        "negative_prompt": request.negative_prompt,
        "size": f"{request.width}x{request.height}",
        **weights,
    }


def parameters(record: Mapping[str, object]) -> str:
    """Return a record in the one-string form that viewers of other programs read."""
    negative = f"Negative prompt: {record['negative_prompt']}\n" if record["negative_prompt"] else ""
    settings = {
        "Steps": record["steps"],
        "CFG scale": record["guidance"],
        "Seed": record["seed"],
        "Size": record["size"],
        "Model": record["model"],
        "Version": f"latteflow {__version__}",
    }
    return f"{record['prompt']}\n{negative}" + ", ".join(f"{name}: {value}" for name, value in settings.items())


def _json(record: Mapping[str, object]) -> str:
    return json.dumps({**record, "version": __version__}, ensure_ascii=False)
