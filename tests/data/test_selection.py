"""Which concepts are drawable: each rule on the smallest set that it bites on."""

from __future__ import annotations

from typing import Any

import pytest

from latteflow.data.captioned import load_captioned_images
from latteflow.data.selection import MIN_STYLES, keeps, left_out
from toys import png_bytes, toy_picture, write_rows

ALL_STYLES = ("noto", "twemoji", "openmoji", "fluent 3d", "fluent flat")


def drawn(key: str, label: str, styles: tuple[str, ...] = ALL_STYLES, **facts: Any) -> list[dict[str, Any]]:
    """The rows of one concept, unlike all others unless ``twins`` says so."""
    twins = facts.pop("twins", {})
    defaults = {"group": "objects", "subgroup": "tools", "skin_tone": "none"}
    return [
        {
            "concept": key,
            "label": label,
            "style": style,
            "twins": twins.get(style, f"{key} {style}"),
            **defaults,
            **facts,
        }
        for style in styles
    ]


HAMMER = drawn("1f528", "hammer")


def reasons(*concepts: list[dict[str, Any]]) -> dict[str, str]:
    rows = [row for concept in (*concepts, HAMMER) for row in concept]
    return {key: rule.name for key, rule in left_out(rows, "drawable").items()}


def test_an_ordinary_thing_stays():
    assert reasons() == {}
    assert left_out(HAMMER, "all") == {}


def test_a_concept_needs_four_styles():
    assert reasons(drawn("1f9af", "white cane", ALL_STYLES[: MIN_STYLES - 1])) == {"1f9af": "few styles"}
    assert reasons(drawn("1f9af", "white cane", ALL_STYLES[:MIN_STYLES])) == {}


def test_a_style_that_repeats_another_counts_for_nothing():
    styles = (*ALL_STYLES[: MIN_STYLES - 1], "fluent modern")
    assert reasons(drawn("1f9af", "white cane", styles)) == {"1f9af": "few styles"}
    [modern] = drawn("1f528", "hammer", ("fluent modern",))
    assert not keeps(modern, "drawable", {})
    assert keeps(modern, "all", {})


def test_skin_tones_are_not_drawable():
    [toned] = drawn("1f44b", "waving hand", ("noto",), skin_tone="dark")
    assert not keeps(toned, "drawable", {})
    assert keeps({**toned, "skin_tone": "none"}, "drawable", {})


@pytest.mark.parametrize(
    ("key", "label", "facts", "reason"),
    [
        ("1f1f3-1f1f5", "flag: nepal", {"group": "flags"}, "flags"),
        ("1f520", "input latin uppercase", {"group": "symbols"}, "symbols"),
        ("1f550", "one o'clock", {}, "clock faces"),
        ("1f567", "twelve-thirty", {}, "clock faces"),
        ("1f6b6-200d-27a1", "person walking: facing right", {}, "direction"),
        ("1f46d", "women holding hands", {"subgroup": "family"}, "family composition"),
        ("1f468-200d-1f467", "family: man, girl", {"subgroup": "family"}, "family composition"),
    ],
)
def test_rules_by_group_and_code_point(key, label, facts, reason):
    assert reasons(drawn(key, label, **facts)) == {key: reason}


@pytest.mark.parametrize(("key", "label"), [("1f54f", "a bowl"), ("1f568", "right speaker"), ("1f46c", "men at work")])
def test_neighbours_of_the_rules_stay(key, label):
    assert reasons(drawn(key, label)) == {}


@pytest.mark.parametrize(
    ("twin", "neutral"),
    [
        ("1f3c4-200d-2640", "1f3c4"),
        ("1f3c4-200d-2642", "1f3c4"),
        ("1f469-200d-1f680", "1f9d1-200d-1f680"),
        ("1f468-200d-1f9af-200d-27a1", "1f9d1-200d-1f9af-200d-27a1"),
    ],
)
def test_a_gendered_drawing_goes_where_a_neutral_one_exists(twin, neutral):
    assert twin in reasons(drawn(twin, "someone"), drawn(neutral, "person"))
    if "27a1" not in twin:
        assert reasons(drawn(twin, "someone"), drawn(neutral, "person")) == {twin: "gender"}
        assert reasons(drawn(twin, "someone")) == {}


def test_man_and_woman_themselves_stay():
    assert reasons(drawn("1f468", "man"), drawn("1f469", "woman"), drawn("1f9d1", "person")) == {}


def test_of_names_that_differ_by_an_opposite_the_first_stays():
    left, right = drawn("1f50d", "magnifying glass tilted left"), drawn("1f50e", "magnifying glass tilted right")
    assert reasons(right, left) == {"1f50e": "opposites"}
    assert reasons(drawn("231b", "hourglass done"), drawn("23f3", "hourglass not done")) == {"23f3": "opposites"}
    assert reasons(drawn("1f4d6", "open book"), drawn("1f4d5", "closed book")) == {}
    assert reasons(drawn("1fac2", "left-facing fist"), drawn("270b", "raised hand")) == {}


def test_near_twins_in_four_styles_leave_one():
    same = {style: style for style in ALL_STYLES}
    three = dict(list(same.items())[: MIN_STYLES - 1])
    first, second = drawn("1f610", "neutral face", twins=same), drawn("1f615", "confused face", twins=same)
    assert reasons(second, first) == {"1f615": "near-twins"}
    assert reasons(first, drawn("1f615", "confused face", twins=three)) == {}


def test_only_what_stays_makes_others_twins():
    same = {style: style for style in ALL_STYLES}
    gone = drawn("1f5ff", "a flag", twins=same, group="flags")
    assert reasons(gone, drawn("1f610", "neutral face", twins=same)) == {"1f5ff": "flags"}


def test_both_splits_leave_out_the_same_and_count_together(tmp_path):
    """A concept with one style held out has four in all, but only three in training."""
    image = {"bytes": png_bytes(toy_picture("circle", "red", "solid")), "path": None}
    rest = {"image": image, "names": [], "tags": [], "codepoints": ""}
    rows = [{**row, **rest, "twins": n} for n, row in enumerate(drawn("1f528", "hammer", ALL_STYLES[:4]))]
    flag = [{**row, **rest, "twins": 9} for row in drawn("1f3c1", "chequered flag", group="flags")]
    write_rows(tmp_path / "train-00000-of-00001.parquet", rows[1:] + flag)
    write_rows(tmp_path / "heldout-00000-of-00001.parquet", rows[:1] + flag)
    train, heldout = (load_captioned_images(tmp_path, split, selection="drawable") for split in ("train", "heldout"))
    assert [record.style for record in train.records] == list(ALL_STYLES[1:4])
    assert [record.style for record in heldout.records] == ["noto"]
    assert len(load_captioned_images(tmp_path, "train")) == 8
