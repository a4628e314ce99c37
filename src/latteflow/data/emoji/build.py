"""Building the emoji set: fetch, render style by style, find twins, split, write parquet shards and the card."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latteflow.data.emoji import card, sources, split, stages
from latteflow.data.emoji.concepts import ConceptTable
from latteflow.data.emoji.stages import EXTRA_STYLES, STYLES, Picture, Progress, Stage
from latteflow.errors import UserError

PARTS = ("train", "heldout", "extra")
"""The parts of a set: ``extra`` holds the pictures of ``EXTRA_STYLES``, to train on only."""

SHARD_ROWS = 4096
"""Rows a shard holds at most."""

_FINGERPRINT_KEY = b"latteflow_emoji"
_STRING = {"dtype": "string", "_type": "Value"}
_STRINGS = {"feature": _STRING, "_type": "Sequence"}
_FEATURES: dict[str, dict[str, Any]] = {
    "image": {"_type": "Image"},
    "concept": _STRING,
    "label": _STRING,
    "names": _STRINGS,
    "tags": _STRINGS,
    "group": _STRING,
    "subgroup": _STRING,
    "style": _STRING,
    "skin_tone": _STRING,
    "codepoints": _STRING,
    "twins": {"dtype": "int64", "_type": "Value"},
}
_SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("concept", pa.string()),
        ("label", pa.string()),
        ("names", pa.list_(pa.string())),
        ("tags", pa.list_(pa.string())),
        ("group", pa.string()),
        ("subgroup", pa.string()),
        ("style", pa.string()),
        ("skin_tone", pa.string()),
        ("codepoints", pa.string()),
        ("twins", pa.int64()),
    ]
)


@dataclass(frozen=True)
class BuildReport:
    """What a data set holds; ``built`` is false when it was complete already and left alone."""

    folder: Path
    built: bool
    images: dict[str, int]


def build_emoji(
    out: Path, cache: Path | None = None, force: bool = False, progress: Progress | None = None
) -> BuildReport:
    """Build the captioned emoji set in folder ``out``; ``datasets.load_dataset(str(out))`` opens it.

    An interrupted build is taken up where it stopped; a complete set is left alone. Building twice gives identical
    files.

    Args:
        out: the folder of the finished set; ``out/.work`` holds what an unfinished build has done.
        cache: the folder of the npm archives (default: one in the user's cache folder).
        force: build anew even if a complete set or stages of one are there.
        progress: called with (what is being done, done, of how many).

    Raises:
        UserError: a package cannot be fetched, an archive is damaged, or ``out`` holds something else.
    """
    _check_folder(out)
    work = out / ".work"
    if force:
        shutil.rmtree(work, ignore_errors=True)
    else:
        images = _complete(out)
        if images is not None:
            return BuildReport(out, False, images)
    archives = _fetch_all(cache or sources.default_cache(), progress)
    table, extras = stages.load_table(archives)
    done: dict[str, Stage] = {}
    for style in (*STYLES, *EXTRA_STYLES):
        done[style.name] = stages.stage(style, archives[style.source.package], table, extras, work, progress)
    pictures = [picture for style in STYLES for picture in done[style.name].pictures]
    component_of, chosen = split_pictures(pictures, progress)
    rows = _rows(pictures, table, component_of)
    parts = {
        "train": [row for row in rows if (row["concept"], row["style"]) not in chosen],
        "heldout": [row for row in rows if (row["concept"], row["style"]) in chosen],
        "extra": _rows(_extra_pictures(done, [picture for picture in pictures if picture.unit in chosen]), table, {}),
    }
    text = card.render(done, parts, component_of, chosen)
    _publish(out, work / "final", parts, text, progress)
    shutil.rmtree(work)
    return BuildReport(out, True, {name: len(part) for name, part in parts.items()})


def _fetch_all(cache: Path, progress: Progress | None) -> dict[str, Path]:
    archives: dict[str, Path] = {}
    for index, source in enumerate(sources.SOURCES):
        if progress is not None:
            progress(f"fetching {source.spec}", index, len(sources.SOURCES))
        archives[source.package] = sources.fetch(source, cache)
    if progress is not None:
        progress("fetched all packages", len(sources.SOURCES), len(sources.SOURCES))
    return archives


def split_pictures(
    pictures: Sequence[Picture], progress: Progress | None = None
) -> tuple[dict[split.Unit, int], frozenset[split.Unit]]:
    """The twin component of every (concept, style) pair, and the pairs to hold out.

    Raises:
        ValueError: the split does not keep what it promises (a mistake in this package).
    """
    pairs = _twin_pairs(pictures, progress)
    families = {style.name: style.family for style in STYLES}
    component_of = split.components([picture.unit for picture in pictures], pairs, families)
    chosen = split.held_out(component_of)
    split.check_split(component_of, chosen)
    return component_of, chosen


def _twin_pairs(pictures: Sequence[Picture], progress: Progress | None = None) -> npt.NDArray[np.int64]:
    pixels = np.zeros((len(pictures), 64, 64, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        with Image.open(io.BytesIO(picture.png)) as image:
            pixels[index] = np.asarray(image)
        if progress is not None and (index % 256 == 255 or index + 1 == len(pictures)):
            progress("looking for twins", index + 1, len(pictures))
    thumbs = split.thumbnails(pixels)
    return split.twin_pairs(split.perceptual_hashes(thumbs), thumbs)


def _extra_pictures(done: dict[str, Stage], heldout: Sequence[Picture]) -> list[Picture]:
    """The pictures of the extra styles that are no twin of a held-out one: all are trained on."""
    extra = [picture for style in EXTRA_STYLES for picture in done[style.name].pictures]
    pairs = _twin_pairs([*heldout, *extra]).tolist()
    # Pairs are in order, so the held-out picture of a mixed pair comes first.
    twins = {right - len(heldout) for left, right in pairs if left < len(heldout) <= right}
    return [picture for index, picture in enumerate(extra) if index not in twins]


def _rows(
    pictures: Sequence[Picture], table: ConceptTable, component_of: dict[split.Unit, int]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for picture in sorted(pictures, key=lambda one: (*one.unit, one.sighting.codepoints)):
        concept = table.concepts[picture.sighting.concept]
        rows.append(
            {
                "image": {"bytes": picture.png, "path": None},
                "concept": concept.key,
                "label": concept.label,
                "names": list(concept.names),
                "tags": list(concept.tags),
                "group": concept.group,
                "subgroup": concept.subgroup,
                "style": picture.style,
                "skin_tone": picture.sighting.skin_tone,
                "codepoints": picture.sighting.codepoints,
                "twins": component_of.get(picture.unit, -1),
            }
        )
    return rows


def _publish(
    out: Path, final: Path, parts: dict[str, list[dict[str, Any]]], text: str, progress: Progress | None
) -> None:
    """Write all files into ``final``, then rename them into ``out``, the card last: with it the set is complete."""
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir(parents=True)
    features = json.dumps({"info": {"features": _FEATURES}})
    schema = _SCHEMA.with_metadata({"huggingface": features, _FINGERPRINT_KEY.decode(): stages.fingerprint()})
    for part, rows in parts.items():
        shards = max(1, -(-len(rows) // SHARD_ROWS))
        for shard in range(shards):
            chosen = rows[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
            name = f"{part}-{shard:05d}-of-{shards:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(chosen, schema=schema), final / name, row_group_size=512)
            if progress is not None:
                progress(f"writing {part}", shard + 1, shards)
    (out / card.FILE_NAME).unlink(missing_ok=True)
    for old in [path for part in parts for path in _shards(out, part)]:
        old.unlink()
    for path in sorted(final.glob("*.parquet")):
        os.replace(path, out / path.name)
    (final / card.FILE_NAME).write_text(text, encoding="utf-8", newline="\n")
    os.replace(final / card.FILE_NAME, out / card.FILE_NAME)


def _shards(out: Path, part: str) -> list[Path]:
    return sorted(out.glob(f"{part}-*-of-*.parquet"))


def _check_folder(out: Path) -> None:
    """Refuse to write over what is not an emoji set of ours, whatever the user forces.

    Raises:
        UserError: ``out`` is a file, or has another card.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder with --out")
    readme = out / card.FILE_NAME
    if readme.exists() and card.MARK not in readme.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{out} holds something else (its {card.FILE_NAME} is not this data set's): name another --out")


def _complete(out: Path) -> dict[str, int] | None:
    """The pictures of each part of the complete set in ``out``, or None when there is no complete set.

    Raises:
        UserError: the set was made from other versions.
    """
    if not (out / card.FILE_NAME).exists():
        return None
    images: dict[str, int] = {}
    for part in PARTS:
        found = _shards(out, part)
        if not found or len(found) != int(found[0].stem.rpartition("-")[2]):
            return None
        images[part] = 0
        for path in found:
            meta = pq.read_metadata(path)
            if (meta.metadata or {}).get(_FINGERPRINT_KEY) != stages.fingerprint().encode():
                raise UserError(f"{out} holds an emoji set made from other versions: give --force to build it anew")
            images[part] += meta.num_rows
    return images
