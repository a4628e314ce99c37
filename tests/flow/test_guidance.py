"""Classifier-free guidance: the formula and its neutral scale."""

import pytest
import torch

from latteflow.flow.guidance import guide


def velocities(dtype=torch.float32):
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_1_returns_the_conditional_velocity_bit_for_bit(dtype):
    v_cond, v_uncond = velocities(dtype)
    assert not torch.equal(v_uncond + (v_cond - v_uncond), v_cond)  # the formula alone would round
    assert torch.equal(guide(v_cond, v_uncond, 1.0), v_cond)


def test_scale_moves_along_the_line_through_both_velocities():
    v_cond, v_uncond = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert guide(v_cond, v_uncond, 0.0).tolist() == [1, 1]
    assert guide(v_cond, v_uncond, 0.5).tolist() == [2, 0]
    assert guide(v_cond, v_uncond, 4.0).tolist() == [9, -7]


def test_velocities_are_never_broadcast():
    with pytest.raises(ValueError, match="one shape"):
        guide(torch.zeros(4, 3), torch.zeros(1, 3), 2.0)
