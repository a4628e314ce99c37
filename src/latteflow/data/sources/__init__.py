"""Captioned pictures of any kind, found by their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latteflow.data.sources.captions_csv import CaptionsCsv
from latteflow.data.sources.image_folder import ImageFolder
from latteflow.data.sources.parquet import Parquet
from latteflow.data.sources.shapes import Shapes
from latteflow.data.sources.source import Source
from latteflow.data.sources.webdataset import WebDataset
from latteflow.errors import UserError

KINDS: Mapping[str, tuple[Callable[..., Source], frozenset[str]]] = {
    "image_folder": (ImageFolder, frozenset({"class_names"})),
    "captions_csv": (CaptionsCsv, frozenset()),
    "webdataset": (WebDataset, frozenset({"class_names", "caption_field", "index_folder"})),
    "parquet": (Parquet, frozenset({"split", "picture_column", "caption_column", "revision", "cache"})),
    "shapes": (lambda path, **options: Shapes(**options), frozenset({"size"})),
}
"""The kinds of sources, and the options of each."""


def open_source(kind: str, path: str | Path, **options: Any) -> Source:
    """Return a source of captioned pictures.

    Args:
        kind: ``image_folder``, ``captions_csv``, ``webdataset``, ``parquet`` or ``shapes``.
        path: what the kind takes: docs/data.md.
        **options: the kind's; None stands for the default.

    Raises:
        UserError: there is no such kind, it has no such option, or the data cannot be read.
    """
    if kind not in KINDS:
        raise UserError(f"no kind of source {kind!r}: there are {', '.join(KINDS)}")
    source, known = KINDS[kind]
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            takers = [other for other, (_, names) in KINDS.items() if name in names]
            whose = f"it is for {', '.join(takers)}" if takers else "no kind does"
            raise UserError(f"a source of kind {kind} takes no {name}: {whose}")
    return source(path, **given)
