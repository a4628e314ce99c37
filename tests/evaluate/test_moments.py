"""Moments put together from parts, and distances of normal distributions, against closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.errors import UserError
from latteflow.evaluate.fidelity import frechet_distance
from latteflow.evaluate.moments import Moments, Normal
from toys import seeded


def draws(number, values, seed=0, shift=0.0):
    return torch.randn(number, values, generator=seeded(seed), dtype=torch.float64) + shift


def covariance(values, seed):
    root = torch.randn(values, values, generator=seeded(seed), dtype=torch.float64)
    return root @ root.T


def normals(values, seed):
    return Normal(draws(1, values, seed)[0], covariance(values, seed + 1))


def close(one, other):
    assert one.number == other.number
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.scatter, other.scatter, rtol=1e-11, atol=1e-11)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.randoms(use_true_random=False), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_parts_in_any_order_are_the_whole(sizes, random, seed):
    features = draws(sum(sizes), 3, seed, shift=5)
    whole = Moments.of(features)
    parts = [Moments.of(part) for part in features.split(sizes)]
    random.shuffle(parts)
    close(Moments.of_all(parts), whole)
    cut = random.randrange(len(parts))
    if cut > 0:
        close(Moments.of_all(parts[:cut]).merged(Moments.of_all(parts[cut:])), whole)


def test_they_are_mean_and_covariance():
    features = draws(50, 4, shift=3)
    normal = Moments.of_all(Moments.of(part) for part in features.split(7)).fitted()
    torch.testing.assert_close(normal.mean, features.mean(dim=0))
    torch.testing.assert_close(normal.covariance, torch.cov(features.T))
    assert normal.number == 50


def test_features_far_from_nought_lose_nothing():
    """Sums of squares, subtracted in the end, would leave nothing of a spread of 1 at 100 million."""
    features = draws(400, 2)
    far = Moments.of_all(Moments.of(part) for part in (features + 1e8).split(32))
    torch.testing.assert_close(far.fitted().covariance, torch.cov(features.T), rtol=1e-6, atol=1e-6)


def test_half_precision_features_are_summed_in_double():
    features = draws(3000, 2, shift=100).half()
    moments = Moments.of_all(Moments.of(part) for part in features.split(100))
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    close(moments, Moments.of(features.double()))


def test_statistics_that_say_their_number_can_be_merged():
    one, other = draws(30, 3), draws(20, 3, 1)
    close(
        Moments.of(one).fitted().moments().merged(Moments.of(other).fitted().moments()),
        Moments.of(torch.cat([one, other])),
    )
    with pytest.raises(UserError, match="give their n"):
        normals(3, 0).moments()


def test_a_covariance_needs_more_pictures_than_values():
    with pytest.raises(UserError, match="covariance of 4 features needs more pictures than that: got 4"):
        Moments.of(draws(4, 4)).fitted()
    assert Moments.of(draws(5, 4)).fitted().number == 5
    with pytest.raises(UserError, match="no pictures"):
        Moments.of_all([])


def test_features_that_are_no_numbers_are_refused():
    features = draws(6, 3)
    for wrong in (float("nan"), float("inf")):
        features[4, 1] = wrong
        with pytest.raises(UserError, match="in 1 of 6 rows, the first is row 4"):
            Moments.of(features)
    broken = Normal(draws(1, 3)[0], torch.full((3, 3), float("nan"), dtype=torch.float64))
    with pytest.raises(UserError, match="not finite"):
        normals(3, 0).frechet_distance(broken)
    with pytest.raises(UserError, match="not finite"):
        broken.frechet_distance(normals(3, 0))


def test_features_of_different_networks_are_refused():
    with pytest.raises(UserError, match="features of 3 values cannot be compared with 4"):
        Moments.of(draws(9, 3)).merged(Moments.of(draws(9, 4)))
    with pytest.raises(UserError, match="features of 3 values cannot be compared with 4"):
        normals(3, 0).frechet_distance(normals(4, 0))


@given(st.integers(1, 8), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_distance_is_symmetric_and_nought_to_itself(values, seed):
    one, other = normals(values, seed), normals(values, seed + 2000)
    there, back = one.frechet_distance(other), other.frechet_distance(one)
    assert there == pytest.approx(back, rel=1e-8)
    assert there > 0
    assert one.frechet_distance(one) == pytest.approx(0, abs=1e-8 * float(one.covariance.trace()))


def test_the_distance_of_known_distributions():
    """Commuting covariances: |m - n|^2 and the squared differences of the standard deviations, turned alike."""
    turn = torch.linalg.qr(draws(4, 4))[0]
    a, b = torch.tensor([1.0, 2, 3, 0], dtype=torch.float64), torch.tensor([4.0, 1, 3, 2], dtype=torch.float64)
    mean = torch.tensor([1.0, -2, 0, 2], dtype=torch.float64)
    one = Normal(mean, turn @ torch.diag(a.square()) @ turn.T)
    other = Normal(torch.zeros(4, dtype=torch.float64), turn @ torch.diag(b.square()) @ turn.T)
    # A direction without any spread has a root whose derivative is infinite: there, rounding shows.
    assert one.frechet_distance(other) == pytest.approx(9 + 9 + 1 + 0 + 4, abs=1e-5)


def test_it_is_what_sets_of_features_have():
    one, other = draws(60, 5), draws(80, 5, 1, shift=0.5)
    fitted = Moments.of(one).fitted().frechet_distance(Moments.of(other).fitted())
    assert fitted == pytest.approx(frechet_distance(one, other), rel=1e-9)
