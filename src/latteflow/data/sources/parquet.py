"""Hugging Face data sets: parquet files in a folder, or a hub id, through the ``datasets`` library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latteflow.data.sources.class_names import first_name
from latteflow.data.sources.source import BadSample, Sample, caption_of, picture_of
from latteflow.errors import UserError

_CAPTIONS = ("caption", "text", "prompt", "label")
"""Columns that are taken for captions, the first that is there."""


class Parquet:
    """Rows of a data set, in its order, each found by its number.

    ``datasets`` writes the rows once more, as Arrow files that it maps into memory, into its own cache.

    Args:
        path: a folder of ``.parquet`` files, one such file, or a hub id.
        split: of a hub id; in a folder, the files whose names begin with it, where there are such.
        picture_column: left out, the one column of pictures.
        caption_column: left out, the first there is of caption, text, prompt and label. Words, a list of words (the
            first counts) or a class (the first of its names counts).
        revision: of the hub.
        cache: where ``datasets`` keeps its Arrow files, if not at its usual place.

    Raises:
        UserError: there is no such data set, or not such columns.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        picture_column: str | None = None,
        caption_column: str | None = None,
        revision: str | None = None,
        cache: str | Path | None = None,
    ) -> None:
        rows = _load(str(path), split, revision, streaming=False, cache=None if cache is None else str(cache))
        self._columns = _Columns(str(path), rows.features, picture_column, caption_column)
        self._rows, self._split = self._columns.undecoded(rows), split

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Return split and number of the row."""
        return f"{self._split}:{index}"

    def read(self, index: int) -> Sample:
        """Return a row's picture and caption."""
        return self._columns.sample(self._rows[index])


class ParquetStream:
    """The same rows one after the other, fetched as they are needed: for encoding, which goes through them once.

    Takes what ``Parquet`` takes.

    Raises:
        UserError: there is no such data set, or not such columns.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        picture_column: str | None = None,
        caption_column: str | None = None,
        revision: str | None = None,
    ) -> None:
        rows = _load(str(path), split, revision, streaming=True)
        rows = rows if rows.features is not None else rows._resolve_features()
        self._columns = _Columns(str(path), rows.features, picture_column, caption_column)
        self._rows, self._split = self._columns.undecoded(rows), split

    def rows(self, start: int = 0) -> Iterator[tuple[str, Any]]:
        """Yield name and row, from row ``start`` on."""
        for number, row in enumerate(self._rows.skip(start), start=start):
            yield f"{self._split}:{number}", row

    def sample(self, row: Any) -> Sample:
        """Return a row's picture and caption.

        Raises:
            BadSample: it cannot be used.
        """
        return self._columns.sample(row)


class _Columns:
    """Which columns hold pictures and captions, and how a row becomes a sample."""

    def __init__(self, path: str, features: Mapping[str, Any], picture: str | None, caption: str | None) -> None:
        from datasets import ClassLabel, Image

        pictures = [name for name, feature in features.items() if isinstance(feature, Image) or _is_bytes(feature)]
        captions = [name for name in _CAPTIONS if name in features]
        self.picture = _column(path, features, "picture", picture, pictures)
        self.caption = _column(path, features, "caption", caption, captions[:1])
        kind = features[self.caption]
        self._classes = [first_name(name) for name in kind.names] if isinstance(kind, ClassLabel) else None

    def undecoded(self, rows: Any) -> Any:
        """Return rows of these two columns, pictures as bytes: they are decoded here, with limits."""
        from datasets import Image

        return rows.select_columns([self.picture, self.caption]).cast_column(self.picture, Image(decode=False))

    def sample(self, row: Mapping[str, Any]) -> Sample:
        data = (row[self.picture] or {}).get("bytes")
        if data is None:
            raise BadSample("no picture in the row")
        return Sample(picture_of(data), self._words(row[self.caption]))

    def _words(self, value: Any) -> str:
        if self._classes is not None:
            if value is None or not 0 <= value < len(self._classes):
                raise BadSample("no caption")
            return caption_of(self._classes[value])
        return caption_of(value[0] if isinstance(value, list) and value else value)


def _is_bytes(feature: Any) -> bool:
    """Tell columns of files that were written without the library, which says that they are pictures."""
    if isinstance(feature, dict):
        return {"bytes", "path"} == set(feature)
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _column(path: str, features: Mapping[str, Any], what: str, wanted: str | None, found: list[str]) -> str:
    listed = ", ".join(features)
    if wanted is not None:
        if wanted not in features:
            raise UserError(f"{path} has no column {wanted!r} ({what}_column): it has {listed}")
        return wanted
    if len(found) != 1:
        raise UserError(f"say which column of {path} holds the {what} with {what}_column: it has {listed}")
    return found[0]


def _load(path: str, split: str, revision: str | None, *, streaming: bool, cache: str | None = None) -> Any:
    from datasets import load_dataset
    from pyarrow import ArrowException

    settings: dict[str, Any] = {"split": split, "streaming": streaming, "cache_dir": cache}
    folder = Path(path)
    try:
        if folder.exists() or path.endswith(".parquet"):
            files = {split: [str(file) for file in _files(folder, split)]}
            return load_dataset("parquet", data_files=files, **settings)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            raise UserError(f"no data set {path}: give a folder of .parquet files, or a hub id")
        return load_dataset(path, revision=revision, **settings)
    except (ArrowException, OSError, ValueError, RuntimeError) as error:  # those of datasets are among them
        if isinstance(error, UserError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"data set {path} ({split}) cannot be read: {reason}") from error


def _files(folder: Path, split: str) -> list[Path]:
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder]
    named = [file for file in files if file.name.startswith((f"{split}-", f"{split}."))]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise UserError(f"no data set {folder}: it holds no .parquet file")
    return named or files
