"""Skin tones that a package's file names get wrong, put right."""

from __future__ import annotations

from dataclasses import replace

from latteflow.data.emoji.concepts import ConceptTable, Sighting

# @lobehub/fluent-emoji-3d 1.1.0 has medium-light and medium exchanged (seen by eye, and against the same drawings of
# fluentui-emoji: 288 of 292 concepts) ...
_EXCHANGED = {"medium-light": "medium", "medium": "medium-light"}
# ... but for couples and the three technologists ...
_RIGHT = frozenset({"1f468-200d-1f4bb", "1f469-200d-1f4bb", "1f9d1-200d-1f4bb"})
# ... and has the person mountain biking from dark to light.
_REVERSED_CONCEPT = "1f6b5"
_REVERSED = {"light": "dark", "medium-light": "medium-dark", "medium-dark": "medium-light", "dark": "light"}


def leave(sighting: Sighting, table: ConceptTable) -> Sighting:
    """The sighting as it is: for packages whose names are right."""
    del table
    return sighting


def mend_fluent_3d(sighting: Sighting, table: ConceptTable) -> Sighting:
    """The sighting of a Fluent 3D file with the skin tone its picture really shows."""
    couple = (sighting.concept, "mixed") in table.toned
    if couple or sighting.concept in _RIGHT:
        return sighting
    wrong = _REVERSED if sighting.concept == _REVERSED_CONCEPT else _EXCHANGED
    tone = wrong.get(sighting.skin_tone, sighting.skin_tone)
    if tone == sighting.skin_tone:
        return sighting
    return replace(sighting, skin_tone=tone, codepoints=table.toned[sighting.concept, tone])
