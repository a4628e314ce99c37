"""One stage per style: every source file rendered and recognised, kept as one parquet file to resume from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latteflow.data.emoji import sources
from latteflow.data.emoji.concepts import ConceptTable, Sighting, build_table, concept_of, split_code_points
from latteflow.data.emoji.render import encode_png, render_raster, render_svg
from latteflow.data.emoji.sources import Source
from latteflow.data.emoji.tones import leave, mend_fluent_3d

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: not known)."""

STAGE_FORMAT = "1"
"""Raised whenever rendering or naming changes, so that stages of an older build are not taken up."""


@dataclass(frozen=True)
class Style:
    """One way of drawing: the package and folder its files are in, and how they are named and rendered.

    Styles of one family are one set of drawings in several finishes.
    """

    name: str
    family: str
    source: Source
    folder: str
    suffix: str
    recognise: Callable[[ConceptTable, str], Sighting | None]
    """From a file's name without its suffix."""
    render: Callable[[bytes], Image.Image]
    mend: Callable[[Sighting, ConceptTable], Sighting] = leave
    """Puts right what a package's file names get wrong."""
    read: Callable[[Path, str, str], Iterable[tuple[str, bytes]]] = sources.members
    """Yields (file name, content) from the package's archive, the folder and the suffix."""


STYLES: tuple[Style, ...] = (
    Style("openmoji", "openmoji", sources.OPENMOJI, "color/svg", ".svg", ConceptTable.recognise, render_svg),
    Style("noto", "noto", sources.GOOGLE, "img/google/64", ".png", ConceptTable.recognise, render_raster),
    Style("twemoji", "twemoji", sources.TWITTER, "img/twitter/64", ".png", ConceptTable.recognise, render_raster),
    Style(
        "fluent 3d",
        "fluent",
        sources.FLUENT_3D,
        "assets",
        ".webp",
        ConceptTable.recognise,
        render_raster,
        mend_fluent_3d,
    ),
    Style("fluent flat", "fluent", sources.FLUENT, "icons/flat", ".svg", ConceptTable.recognise_name, render_svg),
    Style("fluent modern", "fluent", sources.FLUENT, "icons/modern", ".svg", ConceptTable.recognise_name, render_svg),
)

EXTRA_STYLES: tuple[Style, ...] = tuple(
    Style(name, name, source, "icons.json", ".svg", ConceptTable.recognise_squashed, render_svg, leave, sources.icons)
    for name, source in (
        ("noto blob", sources.NOTO_BLOB),
        ("emojione 2", sources.EMOJIONE_2),
        ("emojione 1", sources.EMOJIONE_1),
        ("firefox os", sources.FXEMOJI),
    )
)
"""Older sets, of fewer emoji: more ways to draw a thing to learn from; nothing of them is ever held out."""


@dataclass(frozen=True)
class Picture:
    """One rendered emoji: 64x64 RGB PNG bytes, and what it was recognised as."""

    style: str
    sighting: Sighting
    png: bytes

    @property
    def unit(self) -> tuple[str, str]:
        """The (concept, style) pair, which holds all its skin tones."""
        return (self.sighting.concept, self.style)


@dataclass(frozen=True)
class Stage:
    """All pictures of one style, and the files that were left out."""

    pictures: list[Picture]
    extras: int
    unknown: list[str]
    repeated: int


_SCHEMA = pa.schema(
    [("concept", pa.string()), ("skin_tone", pa.string()), ("codepoints", pa.string()), ("png", pa.binary())]
)


def fingerprint() -> str:
    """What a build depends on: the packages' versions and the form of the stages."""
    return " ".join([f"stages-{STAGE_FORMAT}", *(source.spec for source in sources.SOURCES)])


def load_table(archives: dict[str, Path]) -> tuple[ConceptTable, frozenset[str]]:
    """The concept table, and the sequences (no ``fe0f``) that are OpenMoji's own extras.

    ``archives`` leads from a package's name to its archive.
    """
    openmoji = _json(archives, sources.OPENMOJI, "data/openmoji.json")
    table = build_table(
        _json(archives, sources.EMOJIBASE, "en/data.json"),
        _json(archives, sources.EMOJIBASE, "en/messages.json"),
        openmoji,
        _json(archives, sources.GOOGLE, "emoji.json"),
    )
    extras = (entry["hexcode"] for entry in openmoji if entry["group"].startswith("extras-"))
    return table, frozenset(concept_of(split_code_points(code)) for code in extras)


def _json(archives: dict[str, Path], source: Source, inner: str) -> Any:
    return json.loads(sources.read_member(archives[source.package], inner))


def stage(
    style: Style,
    archive: Path,
    table: ConceptTable,
    extras: frozenset[str],
    work: Path,
    progress: Progress | None = None,
) -> Stage:
    """The pictures of ``style``, taken from ``work`` if an earlier build got that far, else rendered and kept there."""
    kept = work / f"{style.name.replace(' ', '-')}.parquet"
    found = _read(style, kept)
    if found is None:
        found = _render_all(style, archive, table, extras, progress)
        _write(found, kept)
    return found


def _render_all(
    style: Style, archive: Path, table: ConceptTable, extras: frozenset[str], progress: Progress | None
) -> Stage:
    pictures: dict[str, Picture] = {}
    unknown: list[str] = []
    extra = repeated = 0
    files = sorted(style.read(archive, style.folder, style.suffix), key=_longest_name_first)
    for index, (name, data) in enumerate(files):
        stem = name.removesuffix(style.suffix)
        sighting = style.recognise(table, stem)
        sighting = sighting and style.mend(sighting, table)
        if sighting is None:
            by_code_points = style.recognise is ConceptTable.recognise
            if by_code_points and concept_of(split_code_points(stem)) in extras:
                extra += 1
            else:
                unknown.append(name)
        elif sighting.codepoints in pictures:
            repeated += 1
        else:
            pictures[sighting.codepoints] = Picture(style.name, sighting, encode_png(style.render(data)))
        if progress is not None:
            progress(f"rendering {style.name}", index + 1, len(files))
    return Stage([pictures[key] for key in sorted(pictures)], extra, unknown, repeated)


def _longest_name_first(item: tuple[str, bytes]) -> tuple[int, str]:
    """Of two files of one sequence (``0023-fe0f-20e3``, ``23-fe0f-20e3``) the fuller name comes first and is taken."""
    return (-len(item[0]), item[0])


def _rows(files: Stage) -> Iterator[dict[str, Any]]:
    for picture in files.pictures:
        seen = picture.sighting
        yield {
            "concept": seen.concept,
            "skin_tone": seen.skin_tone,
            "codepoints": seen.codepoints,
            "png": picture.png,
        }


def _write(done: Stage, kept: Path) -> None:
    facts = {"extras": done.extras, "unknown": done.unknown, "repeated": done.repeated, "made_by": fingerprint()}
    schema = _SCHEMA.with_metadata({"latteflow": json.dumps(facts)})
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(list(_rows(done)), schema=schema), partial)
    os.replace(partial, kept)


def _read(style: Style, kept: Path) -> Stage | None:
    """The stage in file ``kept``, or None when there is none or one of other versions."""
    if not kept.exists():
        return None
    table = pq.read_table(kept)
    facts = json.loads((table.schema.metadata or {}).get(b"latteflow", b"{}"))
    if facts.get("made_by") != fingerprint():
        return None
    pictures = [
        Picture(style.name, Sighting(row["concept"], row["skin_tone"], row["codepoints"]), row["png"])
        for row in table.to_pylist()
    ]
    return Stage(pictures, facts["extras"], facts["unknown"], facts["repeated"])
