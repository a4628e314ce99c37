"""Captioned pictures held in memory: the training set as one uint8 tensor and a record a picture.

The embedded model's whole set is 21,000 pictures of 64x64, 260 MB decoded: memory is simpler and faster than streaming.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latteflow.data import selection as selections
from latteflow.errors import UserError

_COLUMNS = ("concept", "label", "names", "tags", "group", "subgroup", "style", "skin_tone")


@dataclass(frozen=True)
class Record:
    """What is known of one picture, in words."""

    concept: str
    """Code points without skin tone and variation selector, such as ``1f355``."""
    label: str
    """The one name that counts as the right answer."""
    names: tuple[str, ...]
    """All names, the label among them."""
    tags: tuple[str, ...]
    group: str
    subgroup: str
    style: str
    skin_tone: str
    extra: bool = False
    """Whether the style is one of the set's extra ones, which are there to learn things from."""


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures and their records, in one fixed order."""

    pixels: torch.Tensor
    """uint8, (number, 3, height, width), RGB."""
    records: tuple[Record, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def select(self, keep: Callable[[Record], bool]) -> CaptionedImages:
        """Return the pictures whose record satisfies ``keep``, in the same order."""
        index = [i for i, record in enumerate(self.records) if keep(record)]
        return CaptionedImages(self.pixels[index], tuple(self.records[i] for i in index))

    def joined(self, other: CaptionedImages) -> CaptionedImages:
        """Return these pictures and then ``other``'s."""
        return CaptionedImages(torch.cat([self.pixels, other.pixels]), self.records + other.records)

    def spread(self, number: int) -> CaptionedImages:
        """Return ``number`` pictures spread evenly over the set (all, where it has fewer)."""
        index = torch.linspace(0, len(self) - 1, min(number, len(self))).long().tolist()
        return CaptionedImages(self.pixels[index], tuple(self.records[i] for i in index))

    def pictures(self, index: Iterable[int]) -> list[Image.Image]:
        """Return pictures ``index`` as PIL images."""
        return [Image.fromarray(self.pixels[i].permute(1, 2, 0).numpy()) for i in index]

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Return pictures ``index`` as float32 in [-1, 1], shape (len(index), 3, height, width)."""
        return self.pixels[index].float().div_(127.5).sub_(1.0)


def load_captioned_images(
    folder: str | Path,
    split: str,
    *,
    selection: str = "all",
    leave_out_groups: Sequence[str] = (),
    leave_out_subgroups: Sequence[str] = (),
    styles: Sequence[str] = (),
    skin_tones: Sequence[str] = (),
) -> CaptionedImages:
    """Read one split of a captioned set, such as ``latteflow data emoji`` writes.

    Args:
        folder: where the ``<split>-*.parquet`` files lie.
        split: ``train``, ``heldout`` or ``extra`` (further styles, to train on only).
        selection: ``all``, or a named choice of concepts (``latteflow.data.selection``).
        leave_out_groups: groups to leave out, such as ``flags``.
        leave_out_subgroups: subgroups to leave out.
        styles: the styles to keep; empty keeps all.
        skin_tones: the skin tones to keep; empty keeps all.

    Raises:
        UserError: there is no such set, a filter names what the set does not hold, or nothing is left.
    """
    rows = _read_rows(Path(folder), split)
    known = {key: {row[key] for row in rows} for key in ("group", "subgroup", "style", "skin_tone")}
    for key, wanted in (
        ("group", leave_out_groups),
        ("subgroup", leave_out_subgroups),
        ("style", styles),
        ("skin_tone", skin_tones),
    ):
        unknown = sorted(set(wanted) - known[key])
        if unknown and split == "train":
            raise UserError(f"no {key} {unknown[0]!r} in {folder}: it has {', '.join(sorted(known[key]))}")
    out = selections.left_out(_read_metadata(Path(folder)), selection) if selection != "all" else {}
    rows = [
        row
        for row in rows
        if selections.keeps(row, selection, out)
        and row["group"] not in leave_out_groups
        and row["subgroup"] not in leave_out_subgroups
        and (not styles or row["style"] in styles)
        and (not skin_tones or row["skin_tone"] in skin_tones)
    ]
    if not rows:
        raise UserError(f"no picture of {folder} ({split}) is left after the recipe's filters: loosen them")
    try:
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(_broken(folder, error)) from error
    return CaptionedImages(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        records=tuple(_record(row, extra=split == "extra") for row in rows),
    )


def _record(row: dict[str, Any], *, extra: bool) -> Record:
    words = {key: row[key] for key in _COLUMNS}
    return Record(**{**words, "names": tuple(row["names"]), "tags": tuple(row["tags"])}, extra=extra)


def _read_metadata(folder: Path) -> list[dict[str, Any]]:
    columns = ("concept", "label", "group", "subgroup", "style", "skin_tone", "twins")
    return [row for split in ("train", "heldout") for row in _read_rows(folder, split, columns)]


def _read_rows(folder: Path, split: str, columns: Sequence[str] = ("image", *_COLUMNS)) -> list[dict[str, Any]]:
    # An extra: only training and evaluation on a data set need it.
    from pyarrow import ArrowException, parquet

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise UserError(f"no data set in {folder} (no {split}-*.parquet): build one with `latteflow data emoji`")
    try:
        return [row for file in files for row in parquet.read_table(file, columns=list(columns)).to_pylist()]
    except (ArrowException, OSError) as error:
        raise UserError(_broken(folder, error)) from error


def _broken(folder: str | Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the data set in {folder} cannot be read ({reason}): build it anew"
