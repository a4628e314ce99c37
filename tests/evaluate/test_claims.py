"""Statistics of trials, against closed forms and published values."""

import math

import pytest

from latteflow.errors import UserError
from latteflow.evaluate.claims import at_place, compare, critical_t, smallest_detectable_effect, spread, tail


@pytest.mark.parametrize("t", [0.1, 1.0, 4.0])
def test_students_t_in_closed_form(t):
    # One degree of freedom is Cauchy's distribution; two have an algebraic one.
    assert tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-6)
    assert tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)


@pytest.mark.parametrize(("freedom", "critical"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216)])
def test_critical_values_of_the_tables(freedom, critical):
    assert critical_t(freedom) == pytest.approx(critical, rel=1e-5)


def test_the_noncentral_tail_is_the_normal_one_at_many_degrees_of_freedom():
    def normal_tail(x):
        return math.erfc(x / math.sqrt(2)) / 2

    assert tail(1.96, 100_000, 2.8) == pytest.approx(normal_tail(1.96 - 2.8) + normal_tail(1.96 + 2.8), abs=1e-4)
    assert tail(0.0, 3, 2.8) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("seeds", "effect"),
    # In units of the differences' deviation, from scipy.stats.nct.
    [(34, 0.49503), (15, 0.77802), (10, 0.99600), (5, 1.68200), (3, 3.26404)],
)
def test_the_smallest_detectable_effect_has_its_power(seeds, effect):
    found = smallest_detectable_effect(2.0, seeds)
    assert found / 2 == pytest.approx(effect, abs=2e-5)
    assert tail(critical_t(seeds - 1), seeds - 1, found / 2 * math.sqrt(seeds)) == pytest.approx(0.8, abs=1e-4)


def test_spread_is_the_textbooks():
    found = spread([1.0, 2.0, 4.0, 5.0])
    assert (found.mean, found.number) == (3.0, 4)
    assert found.deviation == pytest.approx(math.sqrt(10 / 3))


def test_a_paired_comparison_by_hand():
    better, than = {0: 1.0, 1: 2.0, 2: 3.0, 9: 0.0}, {0: 1.5, 1: 2.7, 2: 3.3, 8: 0.0}
    found = compare(better, than)
    assert found.differences == pytest.approx((0.5, 0.7, 0.3))  # smaller is better; seeds 8 and 9 have no partner
    assert found.mean == pytest.approx(0.5)
    reach = 4.30265 * 0.2 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.5 - reach, 0.5 + reach), rel=1e-4)
    t = 0.5 / (0.2 / math.sqrt(3))
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)
    assert found.verdict == "replicates"


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ((0.5, 0.6, 0.4), 0.0, "replicates"),
        ((-0.5, -0.6, -0.4), 0.0, "does not replicate"),
        ((0.5, -0.6, 0.4), 0.0, "no verdict"),
        ((0.001, -0.001, 0.0), 0.0, "no verdict"),
        ((0.001, -0.001, 0.0), 0.1, "does not replicate"),
        ((0.0, 0.0, 0.0), 0.1, "does not replicate"),
        ((0.0, 0.0, 0.0), 0.0, "no verdict"),
    ],
)
def test_verdicts(differences, margin, verdict):
    zeros = dict.fromkeys(range(3), 0.0)
    ones = dict(enumerate(differences))
    assert compare(ones, zeros, margin=margin, larger_is_better=True).verdict == verdict
    assert compare(zeros, ones, margin=margin).verdict == verdict


def test_what_cannot_be_told_is_refused():
    with pytest.raises(UserError, match="at least 3 seeds"):
        compare({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0, 3: 3.0})
    with pytest.raises(UserError, match="no number"):
        compare({0: 1.0, 1: 2.0, 2: math.nan}, {0: 1.0, 1: 2.0, 2: 3.0})
    with pytest.raises(UserError, match="two of them"):
        smallest_detectable_effect(1.0, 1)


def test_a_curve_between_its_readings():
    assert at_place([0, 10, 30], [1.0, 0.5, 0.1], 20) == pytest.approx(0.3)
    assert at_place([0, 10, 30], [1.0, 0.5, 0.1], 30) == pytest.approx(0.1)
    assert at_place([10, 30], [0.5, 0.1], 5) is None
