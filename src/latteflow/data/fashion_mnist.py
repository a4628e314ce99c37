"""Fashion-MNIST, 70,000 grey pictures of clothes in ten classes, as a captioned set.

The source is a folder with the four ``.gz`` files of the publisher, such as Debian's package dataset-fashion-mnist puts
in /usr/share/datasets/fashion-mnist. Format of the files: http://yann.lecun.com/exdb/mnist (IDX).
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latteflow.errors import UserError

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""Names by label, one of a kind: "a trouser" is the data set's own word."""
SIDE = 32
"""Pixels a side: 28, and a border of 2 of the background's black."""
_FILES = {"train": "train", "heldout": "t10k"}


def read_idx(file: Path) -> np.ndarray:
    """Return the bytes of an IDX file in their shape, uint8.

    Raises:
        UserError: it is not there, or no gzipped IDX file of bytes.
    """
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(
            f"{file} cannot be read: install Debian's dataset-fashion-mnist, or name the folder of its files"
        ) from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise UserError(f"{file} is no IDX file of bytes")
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, 4) if len(data) >= 4 + 4 * axes else np.zeros(1, ">u4")
    if len(data) != 4 + 4 * axes + int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{file} is cut short, or no IDX file")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape([int(side) for side in shape])


def write_fashion_mnist(source: Path, folder: Path) -> dict[str, int]:
    """Write ``train`` (60,000) and ``heldout`` (10,000) as a captioned set; return how many pictures each has.

    Raises:
        UserError: the files are not there or not whole.
    """
    # An extra: only building data sets needs it.
    from pyarrow import Table, parquet

    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, name in _FILES.items():
        pictures = read_idx(source / f"{name}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{name}-labels-idx1-ubyte.gz")
        if len(pictures) != len(labels):
            raise UserError(f"{source}: {len(pictures)} pictures and {len(labels)} labels of {name}")
        rows = [_row(picture, int(label)) for picture, label in zip(pictures, labels, strict=True)]
        parquet.write_table(Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
        counts[split] = len(rows)
    return counts


def _row(picture: np.ndarray, label: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    border = (SIDE - picture.shape[0]) // 2
    Image.fromarray(np.pad(picture, border)).save(buffer, format="PNG")
    return {
        "image": {"bytes": buffer.getvalue(), "path": None},
        "concept": str(label),
        "label": CLASSES[label],
        "names": [CLASSES[label]],
        "tags": [],
        "group": "clothes",
        "subgroup": "clothes",
        "style": "grey photo",
        "skin_tone": "none",
        "codepoints": str(label),
        "twins": 0,
    }
