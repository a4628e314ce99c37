"""What a source of captioned pictures is, and how one picture is read: on white, upright, or not at all."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
"""Names of pictures end so, in any case; what a file is follows from its first bytes."""
MOST_PIXELS = 89_478_485
"""A picture of more is taken for a decompression bomb: the number at which Pillow begins to warn."""
MOST_ASPECT = 8.0
"""A picture longer than this many times its other side is left out: little of it would be seen. [D]"""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow's decoders raise at broken bytes.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError)
_DAMAGE = (*_DAMAGE, struct.error, zlib.error)
# Of one file, not of the machine: that file alone is left out.
_OF_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EIO)


@dataclass(frozen=True)
class Sample:
    """A picture and its words."""

    picture: Image.Image
    """RGB; what was transparent is white."""
    caption: str


class BadSample(Exception):
    """A sample that cannot be used; the message says why, in the same words every time."""


class Source(Protocol):
    """Captioned pictures in one fixed order, each read by its index; any process reads the same."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what a sample is called, such as its path: the same for as long as the data is."""
        ...

    def read(self, index: int) -> Sample:
        """Return a sample.

        Raises:
            BadSample: it cannot be used.
        """
        ...


def read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        BadSample: there is none, or it may not be read.
        OSError: the machine is at fault (too many open files, a file server that is gone), not this file.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            raise BadSample(f"cannot be read: {error.strerror}") from error
        raise


def picture_of(data: bytes) -> Image.Image:
    """Return the picture that a file holds: RGB, upright as its EXIF says, transparency on white.

    Raises:
        BadSample: it is none, is cut short or broken, or has an absurd size.
    """
    if not data:
        raise BadSample("empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            _check_size(*opened.size)  # of the header: nothing is decoded yet
            opened.load()
            return _on_white(ImageOps.exif_transpose(opened))
    except _BOMB as error:
        raise BadSample(f"more than {MOST_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BadSample("not a PNG, JPEG, WebP, GIF or BMP picture") from error
    except _DAMAGE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadSample(f"broken: {reason}") from error


def caption_of(words: object) -> str:
    """Return a caption without white space around it.

    Raises:
        BadSample: there is none.
    """
    caption = words.strip() if isinstance(words, str) else ""
    if not caption:
        raise BadSample("no caption")
    return caption


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadSample(f"{width} by {height} pixels")
    if width * height > MOST_PIXELS:
        raise BadSample(f"more than {MOST_PIXELS:,} pixels")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise BadSample(f"{width} by {height} pixels: more than {MOST_ASPECT:g} to 1")


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
