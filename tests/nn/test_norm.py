"""RMSNorm rounds as the backbone's does; modulation is neutral at zero."""

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from latteflow.nn.norm import RMSNorm, modulate
from toys import seeded, shake


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 300.0])
def test_returns_the_bits_of_the_backbones_norm(dtype, spread):
    theirs = shake(Qwen2RMSNorm(48, eps=1e-5), seeded()).to(dtype)
    ours = RMSNorm(48, eps=1e-5).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = (spread * torch.randn(64, 5, 48, generator=seeded(1))).to(dtype)
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).dtype == dtype


def test_modulation_scales_around_one_then_shifts():
    x = torch.randn(2, 3, 4, generator=seeded())
    zero = torch.zeros(2, 1, 4)
    assert torch.equal(modulate(x, zero, zero), x)
    shift, scale = torch.randn(2, 2, 1, 4, generator=seeded(1))
    for sample in range(2):
        for token in range(3):
            expected = x[sample, token] * (1 + scale[sample, 0]) + shift[sample, 0]
            torch.testing.assert_close(modulate(x, shift, scale)[sample, token], expected)
