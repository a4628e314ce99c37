"""What classes are called: from a mapping such as ImageNet's synsets to names, or from folders themselves."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from latteflow.errors import UserError

DEFAULT_FILES = ("classes.txt", "classes.csv")
"""Looked for beside the class folders, or the shards, where no mapping is named."""


def find_class_names(folder: Path, file: str | Path | None) -> Mapping[str, str] | None:
    """Return class to name from ``file``, else from a default file in ``folder``, else None.

    Raises:
        UserError: the file is not there or is no mapping.
    """
    if file is not None:
        return read_class_names(Path(file))
    found = [folder / name for name in DEFAULT_FILES if (folder / name).is_file()]
    return read_class_names(found[0]) if found else None


def read_class_names(file: Path) -> Mapping[str, str]:
    """Return class to its first name.

    A ``.csv`` has a header and two columns, class and names; other files have a line a class, first the class, then
    its names: ``n01440764 tench, Tinca tinca`` gives ``tench``.

    Raises:
        UserError: there is no such file, or a line holds no class and name.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class names {file} cannot be read ({error}): give a text or csv file") from error
    if file.suffix.lower() == ".csv":
        rows = [row[:2] for row in csv.reader(text.splitlines()) if row][1:]
    else:
        rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    names = {}
    for row in rows:
        name = first_name(row[1]) if len(row) == 2 else ""
        if not name:
            raise UserError(f"{file}: {' '.join(row)!r} is not a class and its names, as in 'n01440764 tench, Tinca'")
        names[row[0].strip()] = name
    if not names:
        raise UserError(f"{file} names no class")
    return names


def first_name(names: str) -> str:
    """Return the first of the names between commas."""
    return names.split(",")[0].strip()
