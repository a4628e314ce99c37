"""Noise of a picture: its seed and its number decide, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latteflow.errors import UserError
from latteflow.flow.noise import initial_noise

SHAPE = (4, 2, 3)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 2**63 - 1), number=st.integers(1, 5))
def test_picture_i_of_a_batch_is_the_picture_of_seed_plus_i(seed, number):
    noise = initial_noise(SHAPE, number, seeded(seed))
    assert noise.shape == (number, *SHAPE)
    for i in range(number):
        assert torch.equal(noise[i], initial_noise(SHAPE, 1, seeded((seed + i) % 2**63))[0])


def test_a_single_generator_is_left_as_it_was():
    generator = seeded(3)
    before = generator.get_state()
    initial_noise(SHAPE, 4, generator)
    assert torch.equal(generator.get_state(), before)


def test_a_list_holds_a_generator_a_picture_each_moved_on():
    generators = [seeded(5), seeded(9)]
    first = initial_noise(SHAPE, 2, generators)
    assert torch.equal(first[0], torch.randn(SHAPE, generator=seeded(5)))
    assert torch.equal(first[1], torch.randn(SHAPE, generator=seeded(9)))
    assert not torch.equal(initial_noise(SHAPE, 2, generators), first)


def test_without_a_generator_torchs_own_seed_decides():
    torch.manual_seed(0)
    first = initial_noise(SHAPE, 2, None)
    second = initial_noise(SHAPE, 2, None)
    torch.manual_seed(0)
    assert torch.equal(initial_noise(SHAPE, 2, None), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_noise_is_standard_normal():
    noise = initial_noise((1000,), 100, seeded(0))
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("number", [1, 3])
def test_a_list_of_another_length_is_refused(number):
    with pytest.raises(UserError, match=f"2 generators for {number} pictures"):
        initial_noise(SHAPE, number, [seeded(0), seeded(1)])
