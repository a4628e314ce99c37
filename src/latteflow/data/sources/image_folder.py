"""A folder a class, as ImageNet's: ``n01440764/n01440764_10026.JPEG``; the class's name is the caption."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from latteflow.data.sources.class_names import find_class_names
from latteflow.data.sources.source import PICTURE_SUFFIXES, Sample, picture_of, read_file
from latteflow.errors import UserError


class ImageFolder:
    """Pictures under class folders, in the order of their paths.

    Args:
        folder: holds a folder a class.
        class_names: file that says what each class is called; left out, ``classes.txt`` or ``classes.csv`` in the
            folder, else the folders' own names, ``_`` read as a space.

    Raises:
        UserError: there is no such folder, no picture in it, or a class without a name.
    """

    def __init__(self, folder: str | Path, class_names: str | Path | None = None) -> None:
        self.folder = Path(folder).absolute()
        if not self.folder.is_dir():
            raise UserError(f"no folder {folder}: give one that holds a folder of pictures for every class")
        classes = sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir())
        names = find_class_names(self.folder, class_names)
        files = [os.fsencode(file) for name in classes for file in _pictures_under(self.folder, name)]
        if not files:
            raise UserError(f"no picture in {folder}: it has to hold a folder a class, as in cat/1.jpg, dog/2.png")
        self._captions = {name: _caption(name, names, self.folder) for name in {_class_of(file) for file in files}}
        # One block of bytes: a million strings would be copied into every worker process as their counts are touched.
        self._files = np.array(files)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Return the path in the folder, with forward slashes."""
        return os.fsdecode(bytes(self._files[index]))

    def read(self, index: int) -> Sample:
        """Return a picture and the name of its class."""
        name = self.name(index)
        return Sample(picture_of(read_file(self.folder / name)), self._captions[name.split("/")[0]])


def _pictures_under(folder: Path, name: str) -> list[str]:
    found = []
    for where, _, files in os.walk(folder / name):
        inside = Path(where).relative_to(folder).as_posix()
        found += [f"{inside}/{file}" for file in files if file.lower().endswith(PICTURE_SUFFIXES)]
    return sorted(found)


def _class_of(file: bytes) -> str:
    return os.fsdecode(file.split(b"/")[0])


def _caption(name: str, names: Mapping[str, str] | None, folder: Path) -> str:
    if names is None:
        return name.replace("_", " ").strip()
    if name not in names:
        raise UserError(f"class folder {folder / name} is not among the class names: add a line '{name} its name'")
    return names[name]
