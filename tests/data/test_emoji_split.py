"""Twins and the held-out part."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.data.emoji import split

STYLES = ("a", "b", "c", "d", "e")
UNITS = st.sets(st.tuples(st.integers(0, 30).map("c{:02d}".format), st.sampled_from(STYLES)), min_size=1, max_size=120)


def hashed(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    thumbs = split.thumbnails(pixels)
    return split.perceptual_hashes(thumbs), thumbs


def noise(count: int) -> np.ndarray:
    cells = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return cells.repeat(4, axis=1).repeat(4, axis=2)


def test_near_copies_are_twins_and_others_are_not() -> None:
    pixels = noise(4)
    pixels[2] = np.clip(pixels[0].astype(int) + 2, 0, 255)
    assert split.twin_pairs(*hashed(pixels)).tolist() == [[0, 2]]


def test_the_same_shape_in_another_colour_is_no_twin() -> None:
    pixels = np.full((2, 64, 64, 3), 255, dtype=np.uint8)
    pixels[0, 16:48, 16:48] = (200, 0, 0)
    pixels[1, 16:48, 16:48] = (0, 0, 200)
    hashes, thumbs = hashed(pixels)
    assert np.array_equal(hashes[0], hashes[1])
    assert split.twin_pairs(hashes, thumbs).tolist() == []


def test_another_pattern_in_the_same_colours_is_no_twin() -> None:
    pixels = (noise(2) // 32 + 124).astype(np.uint8)
    hashes, thumbs = hashed(pixels)
    assert np.abs(thumbs[0] - thumbs[1]).mean() < split.COLOUR_DISTANCE
    assert split.twin_pairs(hashes, thumbs).tolist() == []


def test_flat_areas_hash_to_nothing_whatever_their_noise() -> None:
    flat = np.full((1, 64, 64, 3), 200, dtype=np.uint8)
    flat[0, :, 4:8] += 1
    assert not hashed(flat)[0].any()


def test_pairs_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(23)
    pixels[22] = pixels[11]
    whole = split.twin_pairs(*hashed(pixels)).tolist()
    monkeypatch.setattr(split, "_BLOCK", 5)
    assert split.twin_pairs(*hashed(pixels)).tolist() == whole == [[11, 22]]


def test_components_join_transitively_and_by_family() -> None:
    units = [("x", "a"), ("y", "a"), ("z", "b"), ("x", "b"), ("x", "c"), ("w", "c")]
    found = split.components(units, np.array([[0, 1], [1, 2]]), {"b": "bc", "c": "bc"})
    assert found[("x", "a")] == found[("y", "a")] == found[("z", "b")]
    assert found[("x", "b")] == found[("x", "c")] != found[("x", "a")]
    # Numbered by the smallest unit, without gaps: w first.
    assert found[("w", "c")] == 0
    assert sorted(set(found.values())) == [0, 1, 2]


@settings(deadline=None)
@given(UNITS, st.data(), st.floats(0.05, 0.6))
def test_any_split_keeps_its_promises(units: set[split.Unit], data: st.DataObject, part: float) -> None:
    listed = sorted(units)
    index = st.integers(0, len(listed) - 1)
    pairs = data.draw(st.lists(st.tuples(index, index), max_size=20))
    component_of = split.components(listed, np.array(pairs, dtype=np.int64).reshape(-1, 2))
    chosen = split.held_out(component_of, part)
    split.check_split(component_of, chosen)
    assert len(chosen) <= round(part * len(listed))
    trained = Counter(concept for concept, style in listed if (concept, style) not in chosen)
    assert all(trained[concept] >= 2 for concept, _ in chosen)
    assert not {component_of[unit] for unit in chosen} & {component_of[unit] for unit in units - chosen}
    # The order in which pictures come decides nothing.
    backwards = [(len(listed) - 1 - one, len(listed) - 1 - two) for one, two in pairs]
    again = split.components(listed[::-1], np.array(backwards, dtype=np.int64).reshape(-1, 2))
    assert again == component_of
    assert split.held_out(again, part) == chosen


def test_the_wanted_part_is_held_out_when_it_can_be() -> None:
    component_of = {(f"c{i:03d}", style): 5 * i + j for i in range(100) for j, style in enumerate(STYLES)}
    assert len(split.held_out(component_of)) == 50


def test_large_components_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    component_of = {(f"c{i:03d}", style): 5 * i + j for i in range(100) for j, style in enumerate(STYLES)}
    families = {(f"c{i:03d}", "a"): 9000 + i // 10 for i in range(100)}
    component_of.update(families)
    assert not families.keys() & split.held_out(component_of, 0.5)
    monkeypatch.setattr(split, "HELD_OUT_COMPONENT", 1.0)
    assert families.keys() & split.held_out(component_of, 0.5)


def test_a_split_that_breaks_its_promises_is_refused() -> None:
    alike = {("x", "a"): 0, ("y", "a"): 0, ("x", "b"): 1, ("x", "c"): 2}
    with pytest.raises(ValueError, match="twins on both sides"):
        split.check_split(alike, frozenset({("x", "a")}))
    lonely = {("x", "a"): 0, ("x", "b"): 1}
    with pytest.raises(ValueError, match="fewer than 2"):
        split.check_split(lonely, frozenset({("x", "a")}))
