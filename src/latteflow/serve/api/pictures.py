"""Pictures that a request brings along: what is decoded, how much of it, for how long, and what is said if it fails."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Collection

import anyio
from PIL import Image, ImageOps

from latteflow.models.conversation import on_white
from latteflow.serve.api.errors import ApiError
from latteflow.serve.api.fetch import fetch_picture
from latteflow.serve.api.settings import PictureLimits

_FORMATS = ("PNG", "JPEG", "WEBP")
_HEADS = tuple(f"data:image/{kind};base64" for kind in ("png", "jpeg", "jpg", "webp"))
_MOST_ASPECT = 100
_BROKEN = (
    # What Pillow raises over broken files; its words name addresses and are not passed on.
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
)


class PictureReader:
    """Reads the pictures of one request, within bounds that hold for all of them together.

    Args:
        limits: the bounds.
        domains: hosts that pictures are fetched from.
        threads: how many pictures are decoded at a time, of all requests.
    """

    def __init__(self, limits: PictureLimits, domains: Collection[str], threads: anyio.CapacityLimiter) -> None:
        self.limits, self.domains, self.threads = limits, domains, threads
        self._count, self._bytes, self._pixels = 0, limits.total_bytes, limits.total_pixels

    async def read(self, url: str) -> Image.Image:
        """Return the picture of a ``data:`` URL, or of one in an allowed domain: RGB, upright, on white.

        Raises:
            ApiError: it is no such picture, or one too many, too large, or too slow.
        """
        self._count += 1
        if self._count > self.limits.count:
            raise _refusal("too_many_images", f"a request holds at most {self.limits.count} pictures")
        with anyio.move_on_after(self.limits.seconds):
            data = _inside(url, self._bytes) if url[:5].lower() == "data:" else await self._fetched(url)
            self._bytes -= len(data)
            if self._bytes < 0:
                raise _too_large(self.limits)
            # A thread cannot be stopped: it is left behind, and its place is taken until it ends.
            image, pixels = await anyio.to_thread.run_sync(
                _decoded, data, self._pixels, self.limits, abandon_on_cancel=True, limiter=self.threads
            )
            self._pixels -= pixels
            return image
        raise _refusal("image_too_slow", f"a picture took longer than {self.limits.seconds:g} s")

    async def _fetched(self, url: str) -> bytes:
        if not self.domains:
            raise _refusal("image_url_not_allowed", "send the picture itself, as a data: URL")
        return await fetch_picture(url, self.domains, self._bytes)


def _inside(url: str, most: int) -> bytes:
    """Return the bytes that a ``data:`` URL holds."""
    head, comma, text = url.partition(",")
    if head.lower() not in _HEADS or not comma:
        raise _refusal("invalid_image_url", "a data: URL has to begin with data:image/png;base64, (or jpeg, or webp)")
    if len(text) > 4 * (most // 3 + 1):
        raise _refusal("image_too_large", "the pictures of this request are too large together")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refusal("invalid_base64", "the picture's base64 is broken") from error


def _decoded(data: bytes, most_pixels: int, limits: PictureLimits) -> tuple[Image.Image, int]:
    """Return a picture and how many pixels it took; what a header promises is judged before anything is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > most_pixels or max(width, height) > _MOST_ASPECT * min(width, height):
                raise _too_large(limits)
            if getattr(picture, "n_frames", 1) != 1:
                raise _refusal("invalid_image", "the picture moves: send a single frame")
            picture.load()
            return on_white(ImageOps.exif_transpose(picture)), width * height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(limits) from error
    except _BROKEN as error:
        raise _refusal("invalid_image", "the picture cannot be read: send an intact PNG, JPEG or WebP file") from error


def _too_large(limits: PictureLimits) -> ApiError:
    return _refusal(
        "image_too_large",
        f"the pictures of a request have at most {limits.total_bytes >> 20} MiB and {limits.total_pixels // 10**6} "
        "megapixels together, and no stripes",
    )


def _refusal(code: str, words: str) -> ApiError:
    return ApiError(400, code, words, param="messages")
