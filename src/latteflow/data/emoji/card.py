"""The data set card: what is in the set, where it comes from, under which licences, and how it was split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from latteflow.data import selection
from latteflow.data.emoji import split
from latteflow.data.emoji.concepts import TONES
from latteflow.data.emoji.sources import SOURCES
from latteflow.data.emoji.stages import EXTRA_STYLES, STYLES, Stage

FILE_NAME = "README.md"
"""The card's file; written last, so it also says that the set is complete."""

MARK = "pretty_name: latteflow emoji"
"""The line that tells this set's card from any other README.md."""

Rows = Sequence[Mapping[str, Any]]

_FRONT = f"""---
{MARK}
license: other
language:
- en
task_categories:
- text-to-image
- visual-question-answering
configs:
- config_name: default
  data_files:
  - split: train
    path: train-*.parquet
  - split: heldout
    path: heldout-*.parquet
  - split: extra
    path: extra-*.parquet
---
"""

_COLUMNS = """## Columns

| column | content |
| --- | --- |
| image | 64x64 RGB PNG; transparent art is composited on white |
| concept | code points (hex, joined by `-`) without skin tone and variation selector |
| label | the Unicode name, lower case |
| names | distinct names, the label first |
| tags | key words |
| group, subgroup | what kind of thing it is ("food & drink", "fruit") |
| style | how it is drawn |
| skin_tone | none, light, medium-light, medium, medium-dark, dark, or mixed (two people who differ) |
| codepoints | the full sequence, skin tone included |
| twins | number of the component of near-twins (see the split); -1 in `extra` |

Two people of different skin tones are spelled out in Unicode (hand + hand) where one tone has a code point of its own
(handshake); both have the concept of the latter.
"""


def render(
    done: Mapping[str, Stage],
    parts: Mapping[str, Rows],
    component_of: Mapping[split.Unit, int],
    chosen: frozenset[split.Unit],
) -> str:
    """The card's text.

    Args:
        done: the stage of every style, for what was left out.
        parts: the rows of ``train``, ``heldout`` and ``extra``.
        component_of: the twin component of every (concept, style) pair.
        chosen: the held-out pairs.
    """
    head = (
        "# latteflow emoji\n\n"
        f"{sum(map(len, parts.values())):,} captioned pictures of {len({unit[0] for unit in component_of}):,} emoji "
        f"in {len(STYLES)} styles and {len(EXTRA_STYLES)} extra ones, 64x64. Built by `latteflow data emoji`.\n"
    )
    sections = [
        _FRONT + head,
        _COLUMNS,
        _count_section(parts),
        _split_section(component_of, chosen),
        _left_out_section(done),
        _selection_section([*parts["train"], *parts["heldout"]]),
        _licence_section(),
    ]
    return "\n".join(sections)


def _table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(map(str, line)) for line in lines)]
    return "\n".join(f"| {row} |" for row in rows) + "\n"


def _counts_by(parts: Mapping[str, Rows], column: str, order: Sequence[str] = ()) -> str:
    counts = {part: Counter(row[column] for row in rows) for part, rows in parts.items()}
    values = order or sorted({value for count in counts.values() for value in count})
    lines = [[value, *(f"{counts[part][value]:,}" for part in parts)] for value in values]
    lines.append(["all", *(f"{len(rows):,}" for rows in parts.values())])
    return _table([column.replace("_", " "), *parts], lines)


def _count_section(parts: Mapping[str, Rows]) -> str:
    return "\n".join(
        [
            "## Pictures\n",
            _counts_by(parts, "style", [style.name for style in (*STYLES, *EXTRA_STYLES)]),
            _counts_by(parts, "skin_tone", ["none", *TONES.values(), "mixed"]),
            _counts_by(parts, "group"),
        ]
    )


def _split_section(component_of: Mapping[split.Unit, int], chosen: frozenset[split.Unit]) -> str:
    sizes = Counter(Counter(component_of.values()).values())
    twins = sum(size * count for size, count in sizes.items() if size > 1)
    return f"""## Split

The unit is the (concept, style) pair with all its skin tones: {len(component_of):,} pairs, {len(chosen):,} of them
({len(chosen) / max(1, len(component_of)):.1%}) held out. Every held-out pair's concept is in the training part in at
least {split.MIN_OTHER_STYLES} other styles, so the held-out part asks for known things in a style not seen of them.

Near-twins are on one side of the split together. Twins are: two pictures of which 256-bit difference hashes (16x16)
differ in at most {split.HASH_DISTANCE} bits and 16x16 RGB thumbnails by at most {split.COLOUR_DISTANCE:g} levels of 255
on average; and the Fluent styles of one concept always, which are one drawing in three finishes. Twins of twins count:
{len(set(component_of.values())):,} components; {twins:,} pairs are in one of two or more, the largest have
{", ".join(str(size) for size in sorted(sizes, reverse=True)[:5])} pairs. Mirrored drawings do not count as twins.

No chance is involved: components are held out in the order of the SHA-256 of their smallest pair, as long as the part
is not full. A component of more than {split.HELD_OUT_COMPONENT:.0%} of the held-out part, such as clock faces, is
always trained on.

The part `extra` holds older sets of fewer emoji, each concept once a style and without skin tones: more ways to draw a
thing, to train on only. A picture of theirs that is a twin of a held-out one is left out.
"""


def _left_out_section(done: Mapping[str, Stage]) -> str:
    lines = []
    for style in (*STYLES, *EXTRA_STYLES):
        left = done[style.name]
        names = ", ".join(f"`{name}`" for name in left.unknown[:12]) + (" ..." if len(left.unknown) > 12 else "")
        lines.append([style.name, left.extras, left.repeated, len(left.unknown), names])
    return (
        "## Left out\n\n"
        "- OpenMoji's own extras (private code points, single regional letters): trademarks are among them, and they "
        "are drawn in one style only.\n"
        "- Fluent's monochrome set, and all sheets and sizes that repeat a picture.\n"
        "- Second files of a sequence already seen (spelled with another number of zeros), and files whose name leads "
        "to no known emoji:\n\n" + _table(["style", "own extras", "repeated", "not recognised", "which"], lines)
    )


def _selection_section(rows: Rows) -> str:
    out = selection.left_out(rows, "drawable")
    counts = Counter(rule.name for rule in out.values())
    kept = [row for row in rows if selection.keeps(row, "drawable", out)]
    lines = [
        [rule.name, counts[rule.name], rule.why]
        for rule in (*selection.RULES, selection.OPPOSITES, selection.NEAR_TWINS)
    ]
    lines += [[f"style {style}", "", why] for style, why in selection.LEFT_OUT_STYLES.items()]
    lines.append(["skin tones", "", "the same drawing in other colours"])
    return f"""## The selection `drawable`

What the embedded model is made for and measured on (`data.selection` in recipes): {len(kept):,} pictures of
{len({row["concept"] for row in kept}):,} concepts in {selection.MIN_STYLES} styles or more, the extra ones not
counted. Rules on the metadata leave out the rest, from every part alike; the first that applies counts:

""" + _table(["rule", "concepts", "why"], lines)


def _licence_section() -> str:
    lines = [[f"npm `{one.spec}`", one.gives, one.licence, one.attribution] for one in SOURCES]
    return (
        "## Sources and licences\n\n"
        + _table(["package", "gives", "licence", "attribution"], lines)
        + "\nIn `@lobehub/fluent-emoji-3d` the skin tones medium-light and medium are exchanged in nearly all file "
        "names (and one emoji's run from dark to light); here they are put right.\n"
        "\nThe pictures were rendered at 64x64 on white and are otherwise unchanged. Each stays under its own "
        "licence; what is derived from OpenMoji's pictures is shared alike (CC BY-SA 4.0).\n"
    )
