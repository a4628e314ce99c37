"""Pictures' records in words: captions to draw from, questions to answer.

Every draw comes from the generator that is handed in, so that a step's words follow from its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from latteflow.data.captioned import Record

WHAT = "What is this?"
WHICH_STYLE = "Which style is this?"
WHICH_CATEGORY = "Which category is this?"
DESCRIBE = "Describe this picture."
ANSWER_TOKENS = 16
"""Enough tokens for any name, style or category."""

_CAPTIONS = (
    "{name}, {style} style",
    "{article}, {style} style",
    "{style} style {name}",
    "a {style} style emoji of {article}",
    "{article} in {style} style",
    "an emoji of {name} drawn in {style} style",
)
_UNSTYLED_CAPTIONS = ("{name}", "{article}", "an emoji of {name}")
_WHAT = (WHAT, "What does this picture show?", "Name this.", "What do you see?")
_STYLE = (WHICH_STYLE, "In which style is this drawn?", "What style is it?")
_CATEGORY = (WHICH_CATEGORY, "What category is it?", "What kind of thing is this?")
_DESCRIBE = (DESCRIBE, "Caption this.")


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


def canonical_caption(record: Record) -> str:
    """Return the one caption that describes a picture best: label, skin tone where there is one, style."""
    tone = "" if record.skin_tone == "none" else f", {record.skin_tone} skin tone"
    return f"{record.label}{tone}, {record.style} style"


def draw_caption(record: Record, generator: torch.Generator) -> str:
    """Return one of the many ways to ask for this picture: any of its names, templates, tags; mostly with its style."""
    name = record.label if _chance(0.5, generator) else _pick(record.names, generator)
    templates = _UNSTYLED_CAPTIONS if _chance(0.1, generator) else _CAPTIONS
    caption = _pick(templates, generator).format(name=name, article=with_article(name), style=record.style)
    if record.skin_tone != "none":
        caption += f", {record.skin_tone} skin tone"
    if record.tags and _chance(0.15, generator):
        caption += f", {_pick(record.tags, generator)}"
    return caption


def draw_turns(
    record: Record, number: int, labels: Sequence[str], generator: torch.Generator, *, styled: bool = True
) -> list[Turn]:
    """Return ``number`` different questions about a picture, the one for its name always among them.

    Args:
        record: the picture.
        number: how many, 1 to 5; there are 3 where no answer may name the style.
        labels: names of other pictures, for yes/no questions that deserve a no.
        generator: where every draw comes from.
        styled: whether answers may name the style, as they cannot where the picture does not show it.
    """
    asked_label = record.label if _chance(0.5, generator) else _pick(labels, generator)
    turns = [
        Turn(_pick(_WHAT, generator), record.label),
        Turn(_pick(_CATEGORY, generator), record.group),
        Turn(f"Is this {with_article(asked_label)}?", "yes" if asked_label == record.label else "no"),
        Turn(_pick(_STYLE, generator), record.style),
        Turn(_pick(_DESCRIBE, generator), canonical_caption(record)),
    ]
    others = 1 + torch.randperm(4 if styled else 2, generator=generator)[: number - 1]
    chosen = [turns[i] for i in [0, *others.tolist()]]
    return [chosen[i] for i in torch.randperm(len(chosen), generator=generator).tolist()]


def with_article(name: str) -> str:
    """Return a noun with its indefinite article: ``a pizza``, ``an apple``."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def exact_share(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of answers that are exactly what is wanted, case apart."""
    return sum(answer.lower() == right.lower() for answer, right in zip(answers, wanted, strict=True)) / len(wanted)


def _pick(items: Sequence[str], generator: torch.Generator) -> str:
    return items[int(torch.randint(len(items), (), generator=generator))]


def _chance(probability: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < probability)
