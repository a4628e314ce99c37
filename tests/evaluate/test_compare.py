"""Two evaluations side by side: what may be compared is, what may not says why."""

from __future__ import annotations

import json

import pytest
from evaluation_toys import evaluation, figure

from latteflow.evaluate.compare import compare


def rows(one, other):
    return compare(evaluation([one]), evaluation([other])).rows


def test_differences_of_what_is_alike():
    [row] = rows(figure(value=0.5), figure(value=0.53, model="other", device="cuda", seeds=[7]))
    assert row.comparable
    assert row.difference == pytest.approx(0.03)
    assert row.verdict == "+3.0 points"
    assert rows(figure(value=12.5, unit=""), figure(value=10.0, unit=""))[0].verdict == "-2.5"
    assert rows(figure(value=2e6, unit="parameters"), figure(value=1e6, unit="parameters"))[0].verdict == "-1M"


def test_a_difference_within_the_seeds_is_said():
    one = figure(value=0.5, lowest=0.4, highest=0.6)
    [row] = rows(one, figure(value=0.6, lowest=0.55, highest=0.7))
    assert row.verdict == "+10.0 points, spreads overlap"
    [row] = rows(one, figure(value=0.7, lowest=0.65, highest=0.8))
    assert row.verdict == "+20.0 points"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "bfloat16"),
        ("steps", 20),
        ("samples", 64),
        ("reference", "another"),
        ("network", "InceptionV3"),
        ("guidance_scale", 2.0),
        ("quantization", "int8"),
        ("judge", "abc"),
    ],
)
def test_figures_of_other_conditions_are_not_comparable(name, value):
    one = figure()
    [row] = rows(one, figure(value=0.6, **{name: value}))
    assert not row.comparable
    assert row.difference is None
    assert row.verdict == f"not comparable: {name} {one.conditions[name]} / {value}"


def test_a_condition_that_one_does_not_say_differs():
    [row] = rows(figure(), figure(extra=3))
    assert row.verdict == "not comparable: extra not said / 3"


def test_figures_of_another_unit_are_not_comparable():
    assert "unit share / dB" in rows(figure(), figure(unit="dB"))[0].verdict


def test_a_figure_of_one_alone_is_said():
    comparison = compare(evaluation([figure("a"), figure("b")]), evaluation([figure("b"), figure("c")]))
    assert [(row.name, row.comparable, row.verdict) for row in comparison.rows] == [
        ("a", False, "in one alone"),
        ("b", True, "+0.0 points"),
        ("c", False, "in one alone"),
    ]


def test_a_figure_without_a_value_has_no_difference():
    assert rows(figure(), figure(value=None))[0].verdict == "no value"


def test_what_differs_of_recipe_and_machine_is_listed():
    one = evaluation(config={"sampling": {"steps": 40, "seeds": [0]}}, environment={"torch": "2", "commit": None})
    other = evaluation(config={"sampling": {"steps": 20, "seeds": [0]}}, environment={"torch": "3", "gpu": "g"})
    comparison = compare(one, other)
    assert comparison.differing == {"torch": ("2", "3"), "gpu": (None, "g"), "sampling.steps": (40, 20)}
    assert compare(one, one).differing == {}


def test_it_is_plain_json():
    values = compare(evaluation(), evaluation()).as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["figures"][0]["difference"] == 0
