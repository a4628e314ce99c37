"""WebDataset shards: tar files in which a sample is ``key.jpg`` beside ``key.txt``, ``key.json`` or ``key.cls``."""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_right
from pathlib import Path
from typing import BinaryIO

from latteflow.data.sources.class_names import find_class_names
from latteflow.data.sources.source import BadSample, Sample, caption_of, picture_of
from latteflow.data.sources.tar_index import tar_index
from latteflow.errors import UserError

_PICTURES = ("jpg", "jpeg", "png", "webp")
_WORDS = ("txt", "json", "cls")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class WebDataset:
    """Samples in the order of the shards' names and of their place in them.

    Args:
        path: a folder of ``.tar`` files, one such file, or a pattern: ``shards/train-{00..31}.tar``,
            ``shards/train-*.tar``.
        class_names: file that says what class a ``.cls`` number is; left out, ``classes.txt`` or ``classes.csv``
            beside the shards.
        caption_field: of ``.json`` files.
        index_folder: where the shards' indexes are kept; left out, they are made anew at every start.

    Raises:
        UserError: there is no shard, one cannot be read, or there are class numbers only and no names for them.
    """

    def __init__(
        self,
        path: str | Path,
        class_names: str | Path | None = None,
        caption_field: str = "caption",
        index_folder: str | Path | None = None,
    ) -> None:
        self._shards = shards_of(str(path))
        self._caption_field = caption_field
        folder = None if index_folder is None else Path(index_folder)
        self._indexes = [tar_index(shard, folder) for shard in self._shards]
        self._ends = list(itertools.accumulate(len(index.keys) for index in self._indexes))
        if not self._ends[-1]:
            raise UserError(f"no sample in {path}: its shards hold no file with a name such as 0001.jpg")
        self._names = find_class_names(self._shards[0].parent, class_names)
        first = self._indexes[0].members[0] if self._indexes[0].members else {}
        if self._names is None and "cls" in first and not {"txt", "json"} & set(first):
            raise UserError(f"{self._shards[0]} holds class numbers and no words: name them with class_names")

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        """Return shard and key."""
        shard, at = self._place(index)
        return f"{self._shards[shard].name}:{self._indexes[shard].keys[at]}"

    def read(self, index: int) -> Sample:
        """Return a sample's picture and its words: of its txt, else its json, else its cls."""
        shard, at = self._place(index)
        files = self._indexes[shard].members[at]
        picture = next((kind for kind in _PICTURES if kind in files), None)
        if picture is None:
            raise BadSample(f"no picture ({', '.join(_PICTURES)}) among {', '.join(files)}")
        words = next((kind for kind in _WORDS if kind in files), None)
        if words is None:
            raise BadSample("no caption")
        with self._shards[shard].open("rb") as tar:
            data, text = (_bytes_at(tar, *files[kind]) for kind in (picture, words))
        return Sample(picture_of(data), self._caption(words, text))

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _caption(self, kind: str, data: bytes) -> str:
        try:
            text = data.decode("utf-8")
            if kind == "txt":
                return caption_of(text)
            if kind == "json":
                return caption_of(json.loads(text)[self._caption_field])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadSample(f"its {kind} holds no caption") from error
        name = (self._names or {}).get(text.strip())
        if name is None:
            raise BadSample(f"class {text.strip()[:20]!r} has no name")
        return name


def shards_of(pattern: str) -> list[Path]:
    """Return the shards that a folder, file or pattern names, in order.

    Raises:
        UserError: it names none, or one that is not there.
    """
    if "://" in pattern:
        raise UserError(f"{pattern} is not on this machine: shards are read in any order, so fetch them first")
    path = Path(pattern).absolute()
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
    elif _RANGE.search(pattern):
        shards = [Path(name).absolute() for name in _expanded(pattern)]
    elif any(sign in path.name for sign in "*?["):
        shards = sorted(path.parent.glob(path.name))
    else:
        shards = [path]
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing is not None or not shards:
        raise UserError(f"no shard {missing or pattern}: give a folder of .tar files, or as in train-{{00..31}}.tar")
    return shards


def _expanded(pattern: str) -> list[str]:
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    low, high = found.groups()
    numbers = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return [
        name for number in numbers for name in _expanded(pattern[: found.start()] + number + pattern[found.end() :])
    ]


def _bytes_at(tar: BinaryIO, start: int, size: int) -> bytes:
    tar.seek(start)
    return tar.read(size)
