"""What a drawn picture says of itself: its settings as text chunks of a PNG."""

from __future__ import annotations

from collections.abc import Mapping

from PIL.PngImagePlugin import PngInfo

from latteflow import __version__


def png_text(record: Mapping[str, object]) -> PngInfo:
    """Return settings as text chunks, a chunk a setting, and the software's name and version.

    Args:
        record: such as ``{"prompt": "a red heart", "seed": 0, "steps": 40}``; any Unicode will do.
    """
    info = PngInfo()
    for key, value in {**record, "software": f"latteflow {__version__}"}.items():
        info.add_itxt(key, str(value))
    return info
