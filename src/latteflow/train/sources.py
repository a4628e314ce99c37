"""From a recipe's data section to the source that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latteflow.data.sources import KINDS, open_source
from latteflow.data.sources.parquet import ParquetStream
from latteflow.data.sources.source import Source
from latteflow.errors import UserError
from latteflow.train.recipe import DataSection


def source_of(data: DataSection, folder: Path) -> Source:
    """Open a source.

    Args:
        data: the section; a field that the kind knows nothing of is refused.
        folder: where the indexes of webdataset shards are kept.

    Raises:
        UserError: its data cannot be read.
    """
    options = _options(data)
    if data.kind == "shapes":
        options["size"] = data.size
    if data.kind == "webdataset":
        options["index_folder"] = folder / "indexes"
    return open_source(data.kind, data.path, **options)


def stream_of(data: DataSection) -> ParquetStream:
    """Open a stream, which can be encoded and not trained on.

    Raises:
        UserError: its kind has none, or its data cannot be read.
    """
    if data.kind != "parquet":
        raise UserError(f"data.streaming is for data.kind=parquet: a {data.kind} source is read where it lies")
    return ParquetStream(data.path, **_options(data))


def _options(data: DataSection) -> dict[str, Any]:
    """Return the section's fields that are some kind's options, where they are set."""
    known = frozenset[str]().union(*(names for _, names in KINDS.values())) - {"size"}  # which is every kind's
    return {name: value for name, value in data.model_dump().items() if name in known and value is not None}
