"""Which concepts of the emoji set a model is made for: documented rules on the metadata, never hand-picked names.

The rules see both splits together and know nothing of models, so training, held-out pictures and evaluation leave out
the same concepts. The split itself stays as it was built.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""One picture's metadata, in the columns of the set: concept, label, group, subgroup, style, skin_tone, twins."""

SELECTIONS = ("all", "drawable")
MIN_STYLES = 4
"""In how many styles a drawable concept comes, and in how many two concepts may look alike before one is left out."""

LEFT_OUT_STYLES = {
    "fluent modern": "at 64x64 the same picture as 'fluent 3d' (the median concept differs by 5.6 levels of 255, "
    "other pairs of styles by 13 to 56): nobody can say which is which",
}
"""Styles that are not drawable, and why."""

_JOINER = "-200d-"
_FEMALE, _MALE, _RIGHTWARDS = "2640", "2642", "27a1"
_MAN, _WOMAN, _PERSON = "1f468", "1f469", "1f9d1"
_CLOCK_FACES = range(0x1F550, 0x1F568)
_OPPOSITES = {
    word: pair[0]
    for pair in (
        ("left", "right"),
        ("leftwards", "rightwards"),
        ("small", "large"),
        ("low", "high"),
        ("raised", "lowered"),
        ("first", "last"),
        ("", "not"),
    )
    for word in pair
}
_GENDERED = {"man", "woman", "men", "women"}


@dataclass(frozen=True)
class Concept:
    """What the rules know of a concept."""

    key: str
    label: str
    group: str
    subgroup: str
    styles: frozenset[str]

    @property
    def parts(self) -> list[str]:
        """The emoji that a joined sequence is made of (one, where nothing is joined)."""
        return self.key.split(_JOINER)


@dataclass(frozen=True)
class Rule:
    """Why concepts are left out, and which: ``applies(concept, keys of all concepts)``."""

    name: str
    why: str
    applies: Callable[[Concept, frozenset[str]], bool]


def _is_gendered_twin(concept: Concept, known: frozenset[str]) -> bool:
    """Whether a drawing of the same thing without a stated gender exists (``woman surfing``: ``person surfing``)."""
    parts = concept.parts
    unsigned = [part for part in parts if part not in (_FEMALE, _MALE)]
    if len(unsigned) < len(parts) and _JOINER.join(unsigned) in known:
        return True
    neutral = _JOINER.join([_PERSON, *parts[1:]])
    return len(parts) > 1 and parts[0] in (_MAN, _WOMAN) and neutral in known


RULES = (
    Rule(
        "few styles",
        f"drawn in fewer than {MIN_STYLES} styles: too little to learn from and to hold out",
        lambda concept, known: len(concept.styles) < MIN_STYLES,
    ),
    Rule("flags", "their stripes and arms are not legible at 64x64", lambda concept, known: concept.group == "flags"),
    Rule(
        "symbols",
        "letters, digits, arrows and signs: glyphs to be typed, not things to be drawn",
        lambda concept, known: concept.group in ("symbols", "components"),
    ),
    Rule(
        "clock faces",
        "24 drawings that differ in two hands of a few pixels",
        lambda concept, known: _JOINER not in concept.key and int(concept.key.split("-")[0], 16) in _CLOCK_FACES,
    ),
    Rule("direction", "the mirror image of another emoji", lambda concept, known: _RIGHTWARDS in concept.parts),
    Rule(
        "family composition",
        "families and couples that differ in who they are made of; the neutral ones stay",
        lambda concept, known: concept.subgroup == "family" and bool(_GENDERED & set(_words(concept.label))),
    ),
    Rule("gender", "a man or a woman where the same drawing of a person exists", _is_gendered_twin),
)
"""The first that applies counts."""

OPPOSITES = Rule(
    "opposites",
    "named like another concept but for left or right, small or large, raised or lowered and the like; the first stays",
    lambda concept, known: False,  # decided over all concepts together, after the rules above
)
NEAR_TWINS = Rule(
    "near-twins",
    f"nearly the same picture as another concept in {MIN_STYLES} styles or more (the set's `twins`); the first stays",
    lambda concept, known: False,  # likewise, last
)


def left_out(rows: Iterable[Row], selection: str) -> dict[str, Rule]:
    """Return the concepts that a selection leaves out, each with the rule that does it.

    Args:
        rows: the metadata of every picture of the set, of both splits.
        selection: one of ``SELECTIONS``.
    """
    if selection == "all":
        return {}
    rows = [row for row in rows if _is_plain(row)]
    concepts = _concepts(rows)
    known = frozenset(concepts)
    found: dict[str, Rule] = {}
    for key, concept in concepts.items():
        rule = next((rule for rule in RULES if rule.applies(concept, known)), None)
        if rule is not None:
            found[key] = rule
    found |= dict.fromkeys(_opposites(concepts[key] for key in concepts if key not in found), OPPOSITES)
    return found | dict.fromkeys(_twins(row for row in rows if row["concept"] not in found), NEAR_TWINS)


def keeps(row: Row, selection: str, out: Mapping[str, Rule]) -> bool:
    """Return whether a picture is in the selection whose left-out concepts are ``out``.

    Pictures of a skin tone, and of styles in ``LEFT_OUT_STYLES``, are not drawable.
    """
    return selection == "all" or (_is_plain(row) and row["concept"] not in out)


def _is_plain(row: Row) -> bool:
    return row["skin_tone"] == "none" and row["style"] not in LEFT_OUT_STYLES


def _concepts(rows: Iterable[Row]) -> dict[str, Concept]:
    facts: dict[str, Row] = {}
    styles: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        facts.setdefault(row["concept"], row)
        styles[row["concept"]].add(row["style"])
    return {
        key: Concept(key, facts[key]["label"], facts[key]["group"], facts[key]["subgroup"], frozenset(styles[key]))
        for key in sorted(facts)
    }


def _opposites(concepts: Iterable[Concept]) -> list[str]:
    """Return concepts whose names say the same as an earlier one's, opposites apart."""
    seen: set[tuple[str, ...]] = set()
    out: list[str] = []
    for concept in concepts:
        said = tuple(word for word in (_OPPOSITES.get(word, word) for word in _words(concept.label)) if word)
        if said in seen:
            out.append(concept.key)
        seen.add(said)
    return out


def _twins(rows: Iterable[Row]) -> list[str]:
    """Return concepts that look like one that stays, in ``MIN_STYLES`` styles; the first in code point order stays."""
    alike: dict[tuple[int, str], set[str]] = defaultdict(set)
    for row in rows:
        alike[row["twins"], row["style"]].add(row["concept"])
    shared: Counter[tuple[str, str]] = Counter()
    for group in alike.values():
        ordered = sorted(group)
        shared.update((first, second) for i, first in enumerate(ordered) for second in ordered[i + 1 :])
    stay: list[str] = []
    out: list[str] = []
    for key in sorted({concept for group in alike.values() for concept in group}):
        looks_like_one = any(shared[first, key] >= MIN_STYLES for first in stay)
        (out if looks_like_one else stay).append(key)
    return out


def _words(label: str) -> list[str]:
    return "".join(char if char.isalpha() else " " for char in label).split()
