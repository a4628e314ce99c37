"""Distances of sets of pictures, against closed forms."""

import pytest
import torch

from latteflow.errors import UserError
from latteflow.evaluate.fidelity import (
    Fidelity,
    frechet_distance,
    kernel_distance,
    picture_features,
    principal_directions,
)
from toys import seeded


def normal(number, values, seed):
    return torch.randn(number, values, generator=seeded(seed), dtype=torch.float64)


def whitened(x):
    """The same set with mean 0 and covariance 1 exactly."""
    x = x - x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_a_set_is_at_no_distance_from_itself():
    x = normal(200, 8, 0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_a_shift_costs_its_square():
    x = normal(200, 8, 0)
    shift = torch.arange(8, dtype=torch.float64)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()))


def test_scales_cost_the_square_of_their_difference():
    """Covariances that commute: the sum of (a - b)^2 over directions."""
    a, b = torch.tensor([1.0, 2, 3], dtype=torch.float64), torch.tensor([4.0, 1, 3], dtype=torch.float64)
    x, y = whitened(normal(500, 3, 0)), whitened(normal(400, 3, 1))
    assert frechet_distance(x * a, y * b) == pytest.approx(float((a - b).square().sum()))


def test_covariances_that_do_not_commute():
    """In two dimensions tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB))."""
    first = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    second = torch.tensor([[1.0, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    x = whitened(normal(300, 2, 0)) @ torch.linalg.cholesky(first).T
    y = whitened(normal(300, 2, 1)) @ torch.linalg.cholesky(second).T
    product = first @ second
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    assert frechet_distance(x, y) == pytest.approx(float(first.trace() + second.trace() - 2 * root))
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y))


def test_the_kernel_distance_of_two_pairs_of_points():
    one = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)
    other = torch.tensor([[2.0, 0], [0, 0]], dtype=torch.float64)
    # Unlike points of one set give the cube of 1, those across give 8 once and 1 three times.
    assert kernel_distance(one, other) == pytest.approx(1 + 1 - 2 * (8 + 1 + 1 + 1) / 4)


def test_the_kernel_distance_has_no_bias():
    """Over many draws of one distribution its mean is nought, though single draws fall on both sides."""
    draws = [kernel_distance(normal(20, 3, 2 * seed), normal(20, 3, 2 * seed + 1)) for seed in range(300)]
    mean, spread = torch.tensor(draws).mean(), torch.tensor(draws).std()
    assert abs(mean) < 3 * spread / 300**0.5
    assert min(draws) < 0 < max(draws)


def test_directions_are_those_of_the_greatest_spread():
    x = whitened(normal(100, 4, 0)) * torch.tensor([1.0, 5, 0.1, 3], dtype=torch.float64)
    found = principal_directions(x + 7, 2).abs()
    expected = torch.zeros(4, 2, dtype=torch.float64)
    expected[1, 0] = expected[3, 1] = 1
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    with pytest.raises(UserError, match="2 directions need more pictures"):
        principal_directions(x[:2], 2)


class Network(torch.nn.Module):
    """80 features: the picture's colours in 80 different sums."""

    def extract_features(self, x):
        mixing = torch.randn(80, 3, generator=seeded(5))
        noise = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ torch.randn(48, 80, generator=seeded(6))
        return (torch.einsum("kc,nchw->nkhw", mixing, x[:, :, :1, :1]) + noise[:, :, None, None]).float()


def test_distances_are_to_as_many_real_pictures_along_their_own_directions():
    real = torch.randint(256, (200, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    other = torch.randint(256, (70, 3, 8, 8), generator=seeded(1), dtype=torch.uint8)
    fidelity = Fidelity(Network(), real, 70)
    assert fidelity.directions.shape == (80, 64)
    same = real[torch.linspace(0, 199, 70).long()]
    assert fidelity.of(same)["frechet"] == pytest.approx(0, abs=1e-6)
    dark = fidelity.of(other // 4)
    assert dark["frechet"] > 2 * fidelity.of(other)["frechet"]
    assert dark["kernel"] > fidelity.of(other)["kernel"]
    with pytest.raises(UserError, match="70 are wanted"):
        fidelity.of(other[:60])


def test_the_network_sees_pictures_of_128_pixels_between_minus_1_and_1():
    class Watched(torch.nn.Module):
        def extract_features(self, x):
            assert x.shape == (3, 3, 128, 128)
            return torch.stack([x.amax((1, 2, 3)), x.amin((1, 2, 3))], 1)[:, :, None, None]

    pictures = torch.tensor([0, 255, 51], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8)
    expected = torch.tensor([[-1.0, -1], [1, 1], [-0.6, -0.6]], dtype=torch.float64)
    torch.testing.assert_close(picture_features(Watched(), pictures), expected, atol=1e-6, rtol=0)
