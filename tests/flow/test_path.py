"""The straight path: its ends, its slope, and the way back to the data."""

import pytest
import torch

from latteflow.flow.path import interpolate, predict_clean, target_velocity

SHAPES = [(5,), (5, 3), (5, 4, 2, 2)]


def noise_and_data(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, *shape), generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_path_starts_at_noise_and_ends_at_data_exactly(shape, dtype):
    x_0, x_1 = noise_and_data(shape, dtype)
    assert torch.equal(interpolate(x_0, x_1, torch.zeros(5)), x_0)
    assert torch.equal(interpolate(x_0, x_1, torch.ones(5)), x_1)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_sample_has_its_own_time(shape):
    x_0, x_1 = noise_and_data(shape)
    t = torch.tensor([0.0, 0.1, 0.25, 0.7, 1.0], dtype=torch.float64)
    x_t = interpolate(x_0, x_1, t)
    for i in range(5):
        torch.testing.assert_close(x_t[i], (1 - float(t[i])) * x_0[i] + float(t[i]) * x_1[i], rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_is_the_slope_of_the_path(shape):
    x_0, x_1 = noise_and_data(shape)
    early, late = (torch.full((5,), t, dtype=torch.float64) for t in (0.25, 0.75))
    slope = (interpolate(x_0, x_1, late) - interpolate(x_0, x_1, early)) / 0.5
    torch.testing.assert_close(target_velocity(x_0, x_1), slope, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_true_velocity_leads_back_to_the_data_from_any_time(shape):
    x_0, x_1 = noise_and_data(shape)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    clean = predict_clean(interpolate(x_0, x_1, t), target_velocity(x_0, x_1), t)
    torch.testing.assert_close(clean, x_1, rtol=0, atol=1e-14)


def test_latents_keep_their_dtype():
    x_0, x_1 = noise_and_data((5, 3), torch.bfloat16)
    t = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert interpolate(x_0, x_1, t).dtype == torch.bfloat16
    assert predict_clean(x_0, x_1, t).dtype == torch.bfloat16


@pytest.mark.parametrize("t", [torch.zeros(()), torch.zeros(1), torch.zeros(5, 1), torch.zeros(3)])
def test_times_of_another_shape_are_refused(t):
    x_0, x_1 = noise_and_data((5, 3))
    with pytest.raises(ValueError, match="one time a sample"):
        interpolate(x_0, x_1, t)
    with pytest.raises(ValueError, match="one time a sample"):
        predict_clean(x_0, x_1, t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_times_too_coarse_to_route_by_are_refused(dtype):
    x_0, x_1 = noise_and_data((5, 3))
    with pytest.raises(ValueError, match="float32 or float64"):
        interpolate(x_0, x_1, torch.zeros(5, dtype=dtype))


def test_latents_are_never_broadcast():
    x, t = torch.zeros(5, 3), torch.zeros(5)
    for function in (lambda a, b: interpolate(a, b, t), target_velocity, lambda a, b: predict_clean(a, b, t)):
        with pytest.raises(ValueError, match="one shape"):
            function(x, torch.zeros(5, 1))
