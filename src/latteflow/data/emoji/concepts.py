"""What a picture shows: code points to a concept, and the names every source has for it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

TONES: dict[str, str] = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
"""Skin tone modifiers and their names."""

VARIATION = "fe0f"
"""The variation selector that asks for the coloured form; it changes nothing about what is shown."""

_HEX = re.compile(r"[0-9a-f]{1,6}")

_SPOKEN = {"\N{RIGHT SINGLE QUOTATION MARK}": "", "'": "", "&": " and ", "#": " hash ", "*": " asterisk "}

# The longest ending first: "-medium-light" also ends in "-light".
_TONE_ENDINGS = ("-medium-light", "-medium-dark", "-light", "-medium", "-dark", "-default")

# Where fluentui-emoji's file names differ from the Unicode names in more than spelling.
_FLUENT_NAMES: dict[str, str] = {
    "blackbird": "black-bird",
    "keycap-hashtag": "keycap-hash",
    "knocked-out-face": "face-with-crossed-out-eyes",
    "man-merpeople": "merman",
    "man-with-bunny-ears": "men-with-bunny-ears",
    "man-wrestling": "men-wrestling",
    "person-merpeople": "merperson",
    "person-with-bunny-ears": "people-with-bunny-ears",
    "person-wrestling": "people-wrestling",
    "phoenix-bird": "phoenix",
    "red-triangle": "red-triangle-pointed-up",
    "stuffedbread": "stuffed-flatbread",
    "stuffedbread-flat": "stuffed-flatbread",
    "woman-merpeople": "mermaid",
    "woman-with-bunny-ears": "women-with-bunny-ears",
    "woman-wrestling": "women-wrestling",
}


def split_code_points(text: str) -> tuple[str, ...]:
    """The code points of a file or data name such as ``1F44B-1F3FB``: lower-case hex of four digits or more.

    Raises:
        ValueError: a part is no hexadecimal number of one to six digits.
    """
    parts = text.lower().replace("_", "-").replace(" ", "-").split("-")
    bad = [part for part in parts if not _HEX.fullmatch(part)]
    if bad:
        raise ValueError(f"not code points joined by '-': {text!r}")
    return tuple(part.lstrip("0").rjust(4, "0") for part in parts)


def concept_of(points: Iterable[str]) -> str:
    """The code points without skin tones and variation selectors, joined by '-' (the picture's concept).

    A sequence of nothing else (a lone skin tone swatch) is its own concept.
    """
    points = tuple(points)
    kept = [point for point in points if point not in TONES and point != VARIATION]
    return "-".join(kept or points)


def skin_tone_of(points: Iterable[str]) -> str:
    """``none``, one of the five tone names, or ``mixed`` when two people differ; a lone swatch has none."""
    points = tuple(points)
    tones = {TONES[point] for point in points if point in TONES}
    if not tones or all(point in TONES for point in points):
        return "none"
    return tones.pop() if len(tones) == 1 else "mixed"


def normalise_name(name: str) -> str:
    """``name`` as lower-case ASCII words joined by '-', so that spellings of different sources meet."""
    flat = unicodedata.normalize("NFKD", name.lower())
    flat = "".join(char for char in flat if not unicodedata.combining(char))
    for char, words in _SPOKEN.items():
        flat = flat.replace(char, words)
    return re.sub(r"[^a-z0-9]+", "-", flat).strip("-")


@dataclass(frozen=True)
class Concept:
    """One emoji, whatever its style and skin tone."""

    key: str
    label: str
    names: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    subgroup: str


@dataclass(frozen=True)
class Sighting:
    """What one source file was recognised as."""

    concept: str
    skin_tone: str
    codepoints: str


@dataclass
class ConceptTable:
    """All concepts, and how code points and names lead to them."""

    concepts: dict[str, Concept] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    sequences: dict[str, str] = field(default_factory=dict)
    toned: dict[tuple[str, str], str] = field(default_factory=dict)
    by_name: dict[str, str] = field(default_factory=dict)
    by_squashed: dict[str, str] = field(default_factory=dict)

    def recognise(self, text: str) -> Sighting | None:
        """The sighting of a file named by its code points, or None when no concept is known for them."""
        points = split_code_points(text)
        concept = self.concept(points)
        if concept is None:
            return None
        plain = _without_variation(points)
        return Sighting(concept, skin_tone_of(points), self.sequences.get(plain, "-".join(points)))

    def recognise_name(self, stem: str) -> Sighting | None:
        """The sighting of a file named in words (``woman-surfing-dark``), or None when the name is not known.

        The whole name is tried first, because some end in what looks like a skin tone (``police-car-light``).
        """
        whole = self._concept_named(stem)
        if whole is not None:
            return Sighting(whole, "none", self.toned[whole, "none"])
        ending = next((ending for ending in _TONE_ENDINGS if stem.endswith(ending)), None)
        concept = self._concept_named(stem.removesuffix(ending)) if ending else None
        if ending is None or concept is None:
            return None
        tone = "none" if ending == "-default" else ending[1:]
        sequence = self.toned.get((concept, tone))
        return None if sequence is None else Sighting(concept, tone, sequence)

    def recognise_squashed(self, stem: str) -> Sighting | None:
        """The sighting of a file named by any name of an emoji, with hyphens anywhere or nowhere (``loveletter``)."""
        concept = self.by_squashed.get(stem.replace("-", ""))
        return None if concept is None else Sighting(concept, "none", self.toned[concept, "none"])

    def concept(self, points: Iterable[str]) -> str | None:
        """The known concept of these code points, or None."""
        key = concept_of(points)
        key = self.aliases.get(key, key)
        return key if key in self.concepts else None

    def _concept_named(self, stem: str) -> str | None:
        for name in _spellings(stem):
            if name in self.by_name:
                return self.by_name[name]
        return None


def _spellings(stem: str) -> list[str]:
    """``stem`` and what other sources call the same thing (``person-elf``: ``elf``, ``man-deaf``: ``deaf-man``)."""
    name = _FLUENT_NAMES.get(stem, stem)
    spellings = [name, name.replace("blonde", "blond")]
    first, _, rest = name.partition("-")
    if first == "person":
        spellings.append(rest)
    if rest == "deaf":
        spellings.append(f"deaf-{first}")
    return spellings


def _without_variation(points: Iterable[str]) -> str:
    return "-".join(point for point in points if point != VARIATION)


def build_table(
    emojibase: list[dict[str, Any]],
    messages: dict[str, Any],
    openmoji: list[dict[str, Any]],
    datasource: list[dict[str, Any]],
) -> ConceptTable:
    """Join the four name lists by concept.

    Only what emojibase files under a group becomes a concept: OpenMoji's own extras and single regional letters do not.

    Args:
        emojibase: the entries of emojibase-data's ``en/data.json``.
        messages: its ``en/messages.json`` (group names).
        openmoji: the entries of openmoji's ``data/openmoji.json``.
        datasource: the entries of emoji-datasource's ``emoji.json``.
    """
    table = ConceptTable()
    entries = {concept_of(split_code_points(entry["hexcode"])): entry for entry in emojibase if "group" in entry}
    for key, entry in entries.items():
        _add_sequences(table, key, entry, entries)
    by_openmoji = _first_plain(openmoji, "hexcode")
    by_datasource = _first_plain(datasource, "unified")
    labels = {str(entry["label"]).lower(): key for key, entry in entries.items()}
    groups = {item["order"]: item["message"] for item in messages["groups"]}
    subgroups = {item["order"]: item["message"] for item in messages["subgroups"]}
    for key, entry in entries.items():
        moji, data = by_openmoji.get(key, {}), by_datasource.get(key, {})
        label = str(entry["label"]).lower()
        group = groups[entry["group"]]
        names = [name for name in _names(moji, data, group) if labels.get(name, key) == key]
        tags = [*entry.get("tags", []), *_listed(moji.get("tags")), *_listed(moji.get("openmoji_tags"))]
        table.concepts[key] = Concept(
            key, label, _distinct([label, *names]), _distinct(tags), group, subgroups[entry["subgroup"]]
        )
    _index_names(table, by_openmoji, by_datasource)
    return table


def _add_sequences(table: ConceptTable, key: str, entry: dict[str, Any], keys: Container[str]) -> None:
    for form in (entry, *entry.get("skins", [])):
        points = split_code_points(form["hexcode"])
        sequence = "-".join(points)
        table.sequences[_without_variation(points)] = sequence
        table.toned.setdefault((key, skin_tone_of(points)), sequence)
        # Two people of different tones are spelled out (hand + hand) where one tone has a code point of its own
        # (handshake): the same concept all the same.
        alias = concept_of(points)
        if alias != key and alias not in keys:
            table.aliases[alias] = key


def _first_plain(entries: list[dict[str, Any]], code: str) -> dict[str, dict[str, Any]]:
    """The entries by concept, those without a skin tone first choice."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if str(entry.get("group", "")).startswith("extras-"):
            continue
        points = split_code_points(entry[code])
        if skin_tone_of(points) == "none":
            found.setdefault(concept_of(points), entry)
    return found


def _names(moji: dict[str, Any], data: dict[str, Any], group: str) -> list[str]:
    short = [name.replace("_", " ").replace("-", " ").strip() for name in data.get("short_names", [])]
    if group == "flags":
        # Short names of flags are country codes ("flag ad", "us"), no words.
        short = []
    names = [moji.get("annotation", ""), data.get("name") or "", *short]
    return [name.lower() for name in names if any(char.isalpha() for char in name)]


def _listed(text: str | None) -> list[str]:
    return (text or "").split(",")


def _distinct(items: Iterable[str]) -> tuple[str, ...]:
    stripped = (item.strip().lower() for item in items)
    return tuple(dict.fromkeys(item for item in stripped if item))


def _index_names(
    table: ConceptTable, by_openmoji: dict[str, dict[str, Any]], by_datasource: dict[str, dict[str, Any]]
) -> None:
    """Fill the indices by name; where concepts share a name, the better source wins (labels, then longer names)."""
    for concept in table.concepts.values():
        table.by_name.setdefault(normalise_name(concept.label), concept.key)
    for key, entry in by_openmoji.items():
        if key in table.concepts:
            table.by_name.setdefault(normalise_name(entry["annotation"]), key)
    for key, entry in by_datasource.items():
        if key in table.concepts and entry.get("name"):
            table.by_name.setdefault(normalise_name(entry["name"]), key)
    table.by_name.pop("", None)
    for name, key in table.by_name.items():
        table.by_squashed.setdefault(name.replace("-", ""), key)
    for concept in table.concepts.values():
        for name in concept.names:
            table.by_squashed.setdefault(normalise_name(name).replace("-", ""), concept.key)
    table.by_squashed.pop("", None)
