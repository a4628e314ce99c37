"""Inception score, precision and recall, against closed forms and plain definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.data.loader import generator_of
from latteflow.errors import UserError
from latteflow.evaluate.scores import inception_score, precision_and_recall
from toys import seeded


def draws(number, values, seed=0, shift=0.0):
    return torch.randn(number, values, generator=seeded(seed), dtype=torch.float64) + shift


def test_pictures_that_say_nothing_score_1():
    assert inception_score(torch.full((40, 4), 0.25), splits=10) == pytest.approx((1, 0))


def test_certain_pictures_of_every_class_score_their_number():
    value, spread = inception_score(torch.eye(5).repeat(8, 1), splits=1)
    assert value == pytest.approx(5)
    assert spread == 0


@pytest.mark.parametrize("certain", [0.5, 0.7, 0.99])
def test_the_score_of_a_known_distribution(certain):
    """Two classes in turn, each said with one certainty: the exponential of log 2 less the entropy."""
    rows = torch.tensor([[certain, 1 - certain], [1 - certain, certain]], dtype=torch.float64).repeat(10, 1)
    entropy = -certain * math.log(certain) - (1 - certain) * math.log(1 - certain)
    assert inception_score(rows, splits=1)[0] == pytest.approx(2 * math.exp(-entropy))


def test_a_set_that_is_sorted_by_class_scores_as_any_other():
    """Splits that followed the order would see one class each, and score 1."""
    by_class, in_turns = torch.eye(4).repeat_interleave(500, dim=0), torch.eye(4).repeat(500, 1)
    for rows in (by_class, in_turns):
        value, spread = inception_score(rows, splits=4)
        assert 3.95 < value < 4
        assert 0 < spread < 0.05


def test_mean_and_spread_are_those_of_the_splits():
    rows = draws(90, 3).softmax(dim=1)
    order = torch.randperm(90, generator=generator_of(0, "inception score"))
    parts = torch.tensor([inception_score(rows[part], splits=1)[0] for part in order.split(30)], dtype=torch.float64)
    assert inception_score(rows, splits=3) == pytest.approx((float(parts.mean()), float(parts.std(correction=0))))


def test_scores_of_too_few_pictures_and_of_no_probabilities_are_refused():
    rows = torch.full((39, 4), 0.25)
    with pytest.raises(UserError, match="4 classes needs that many pictures in each of 10 splits: got 39"):
        inception_score(rows)
    with pytest.raises(UserError, match="0 splits"):
        inception_score(rows, splits=0)
    with pytest.raises(UserError, match="apply softmax first"):
        inception_score(rows * 2, splits=2)
    with pytest.raises(UserError, match="apply softmax first"):
        inception_score(torch.tensor([[1.5, -0.5]]).repeat(9, 1), splits=2)
    rows[3, 3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        inception_score(rows, splits=2)


def by_definition(real, drawn, k):
    """Precision and recall as they are written down, pair by pair."""

    def reach(features):
        apart = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        return apart.fill_diagonal_(math.inf).sort(dim=1).values[:, k - 1]

    apart = torch.cdist(drawn, real, compute_mode="donot_use_mm_for_euclid_dist")
    precision = (apart <= reach(real)).any(dim=1).double().mean()
    return float(precision), float((reach(drawn) >= apart.T).any(dim=1).double().mean())


@given(st.integers(5, 20), st.integers(5, 20), st.integers(1, 4), st.integers(1, 25), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_blocks_of_any_size_give_what_the_definition_says(reals, drawns, k, block, seed):
    real, drawn = draws(reals, 3, seed), draws(drawns, 3, seed + 1000, shift=0.7)
    assert precision_and_recall(real, drawn, k=k, block=block) == by_definition(real, drawn, k)
    precision, recall = precision_and_recall(real, drawn, k=k)
    assert precision_and_recall(drawn, real, k=k) == (recall, precision)


@given(st.integers(4, 30), st.integers(1, 9), st.floats(0, 1e4), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_a_set_is_wholly_within_itself(number, block, shift, seed):
    """Also one with many equal pictures, whose balls have no size, far from nought."""
    real = draws(number, 5, seed, shift).float()
    for features in (real, real[:4].repeat(6, 1)):
        assert precision_and_recall(features, features.flip(0), block=block) == (1, 1)


def test_sets_apart_have_neither():
    assert precision_and_recall(draws(50, 4), draws(60, 4, 1, shift=100)) == (0, 0)


def test_half_of_the_world_drawn_well_is_precise_and_misses_half():
    """Two clusters, of which one is drawn; then both and a third that is not real."""
    here, there = draws(40, 3), draws(40, 3, 1, shift=100)
    assert precision_and_recall(torch.cat([here, there]), here) == (1, 0.5)
    nowhere = draws(40, 3, 2, shift=-100)
    assert precision_and_recall(torch.cat([here, there]), torch.cat([here, there, nowhere, nowhere + 50])) == (0.5, 1)


def test_precision_of_too_few_or_unlike_features_is_refused():
    with pytest.raises(UserError, match="look at 3 neighbours: got 3 real and 9 drawn"):
        precision_and_recall(draws(3, 2), draws(9, 2))
    with pytest.raises(UserError, match="got 9 real and 3 drawn"):
        precision_and_recall(draws(9, 2), draws(3, 2))
    with pytest.raises(UserError, match="features of 2 values cannot be compared with 3"):
        precision_and_recall(draws(9, 2), draws(9, 3))
    wrong = draws(9, 2)
    wrong[0, 0] = float("nan")
    for pair in ((wrong, draws(9, 2)), (draws(9, 2), wrong)):
        with pytest.raises(UserError, match="not finite"):
            precision_and_recall(*pair)
