"""A folder of pictures with a ``captions.csv``: columns ``file`` and ``caption``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from latteflow.data.sources.source import Sample, caption_of, picture_of, read_file
from latteflow.errors import UserError

_COLUMNS = ("file", "caption")


class CaptionsCsv:
    """Pictures in the order of the file's rows; a picture may have several rows, each a sample.

    Args:
        path: the folder, or the csv file itself; pictures are named from where the file is.

    Raises:
        UserError: there is no such file, it lacks a column, or a row names a picture outside the folder.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path).absolute()
        file = file / "captions.csv" if file.is_dir() else file
        self.folder = file.parent
        try:
            self._rows = list(_rows(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"captions {file} cannot be read ({error}): give a folder that holds captions.csv (UTF-8), columns "
                "file and caption"
            ) from error
        if not self._rows:
            raise UserError(f"{file} has no row below its header")

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Return the picture's path as the row gives it."""
        return self._rows[index][0]

    def read(self, index: int) -> Sample:
        """Return a picture and its caption."""
        name, caption = self._rows[index]
        return Sample(picture_of(read_file(self.folder / name)), caption_of(caption))


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{file} has no column {missing[0]!r}: it has {', '.join(reader.fieldnames or ['none'])}")
        for row in reader:
            name = PurePosixPath((row["file"] or "").replace("\\", "/"))
            if not name.name or name.is_absolute() or ".." in name.parts:
                raise UserError(f"{file}, line {reader.line_num}: {row['file']!r} names no picture inside the folder")
            yield str(name), row["caption"] or ""
