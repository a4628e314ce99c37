"""Code points and names to concepts."""

from __future__ import annotations

import emoji_packages as fake
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latteflow.data.emoji.concepts import (
    TONES,
    VARIATION,
    build_table,
    concept_of,
    normalise_name,
    skin_tone_of,
    split_code_points,
)
from latteflow.data.emoji.tones import mend_fluent_3d

PLAIN = st.integers(0x20, 0x1F3FA).filter(lambda code: code != 0xFE0F).map(lambda code: f"{code:04x}")
SEQUENCES = st.lists(PLAIN, min_size=1, max_size=6)


@given(SEQUENCES)
def test_code_points_survive_case_zeros_and_separators(points: list[str]) -> None:
    assert split_code_points("-".join(points).upper()) == tuple(points)
    assert split_code_points("_".join(point.zfill(6) for point in points)) == tuple(points)
    assert split_code_points("-".join(point.lstrip("0") for point in points)) == tuple(points)


@pytest.mark.parametrize("text", ["", "1f44b-", "woman", "1f44b--fe0f", "1234567"])
def test_what_is_no_code_point_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not code points"):
        split_code_points(text)


@given(SEQUENCES, st.data())
def test_tones_and_variation_selectors_do_not_change_the_concept(points: list[str], data: st.DataObject) -> None:
    decorated = list(points)
    for extra in data.draw(st.lists(st.sampled_from([*TONES, VARIATION]), max_size=4)):
        decorated.insert(data.draw(st.integers(1, len(decorated))), extra)
    assert concept_of(decorated) == "-".join(points)


@given(SEQUENCES, st.lists(st.sampled_from(list(TONES)), max_size=3))
def test_skin_tone_is_none_one_or_mixed(points: list[str], modifiers: list[str]) -> None:
    found = skin_tone_of([*points, *modifiers])
    kinds = {TONES[modifier] for modifier in modifiers}
    assert found == ("none" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed")


def test_a_lone_swatch_is_its_own_concept_without_skin_tone() -> None:
    assert concept_of(["1f3fb"]) == "1f3fb"
    assert skin_tone_of(["1f3fb"]) == "none"


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        ("Woman\N{RIGHT SINGLE QUOTATION MARK}s Hat", "womans-hat"),
        ("Curaçao & Co.", "curacao-and-co"),
        ("keycap: #", "keycap-hash"),
    ],
)
def test_names_of_different_sources_meet(name: str, flat: str) -> None:
    assert normalise_name(name) == flat


def table_of(extra: list[dict[str, object]] | None = None):
    data = [{"unified": "1F34E", "name": "BANANA", "short_names": ["apple", "+1"]}]
    return build_table([*fake.emojibase(), *(extra or [])], fake.GROUPS, fake.openmoji(), data)


def test_names_tags_and_groups_are_joined() -> None:
    apple = table_of().concepts["1f34e"]
    assert apple.label == "red apple"
    # "banana" is another concept's label and "+1" no word: neither is a name of the apple.
    assert apple.names == ("red apple", "apple")
    assert apple.tags == ("tag", "red apple", "more", "drawn")
    assert (apple.group, apple.subgroup) == ("things & more", "all sorts")


def test_extras_and_regional_letters_are_no_concepts() -> None:
    table = table_of()
    assert table.recognise("E045") is None
    assert table.recognise("1F1E6") is None


def test_names_in_words_lead_to_code_points() -> None:
    table = table_of()
    hand = table.recognise_name("waving-hand-medium-light")
    assert hand is not None
    assert (hand.concept, hand.skin_tone, hand.codepoints) == ("1f44b", "medium-light", "1f44b-1f3fc")
    # "-light" is no skin tone here, and an elf is a person.
    light, elf = table.recognise_name("police-car-light"), table.recognise_name("person-elf")
    assert light is not None
    assert (light.concept, light.skin_tone) == ("1f6a8", "none")
    assert elf is not None
    assert elf.concept == "1f9dd"
    assert table.recognise_name("no-such-thing") is None
    assert table.recognise_name("banana-dark") is None


def test_people_of_two_tones_have_the_concept_of_the_pair() -> None:
    pair = {
        "label": "handshake",
        "hexcode": "1F91D",
        "group": 0,
        "subgroup": 0,
        "skins": [{"hexcode": "1F91D-1F3FC"}, {"hexcode": "1F91D-1F3FD"}, {"hexcode": "1FAF1-1F3FB-200D-1FAF2-1F3FC"}],
    }
    table = table_of([pair])
    mixed = table.recognise("1FAF1-1F3FB-200D-1FAF2-1F3FC")
    assert mixed is not None
    assert (mixed.concept, mixed.skin_tone) == ("1f91d", "mixed")
    # Couples are named rightly in the package that has medium and medium-light exchanged elsewhere.
    assert mend_fluent_3d(mixed, table) == mixed
    both = table.recognise("1F91D-1F3FC")
    assert both is not None
    assert mend_fluent_3d(both, table) == both


def test_the_tones_of_fluent_3d_are_mended() -> None:
    table = table_of()

    def mended(code: str) -> tuple[str, str]:
        sighting = table.recognise(code)
        assert sighting is not None
        found = mend_fluent_3d(sighting, table)
        return found.skin_tone, found.codepoints

    assert mended("1F44B-1F3FC") == ("medium", "1f44b-1f3fd")
    assert mended("1F44B-1F3FD") == ("medium-light", "1f44b-1f3fc")
    assert mended("1F44B-1F3FF") == ("dark", "1f44b-1f3ff")
    assert mended("1F44B") == ("none", "1f44b")
    assert mended("1F6B5-1F3FF") == ("light", "1f6b5-1f3fb")
