"""Patches go and come back; time and places are written as sinusoids."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from latteflow.nn.embeddings import PatchEmbedding, PooledContext, TimeEmbedding, patchify, sinusoidal, unpatchify
from toys import seeded, shake


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_patches_put_back_are_the_latents(batch, channels, rows, columns, patch):
    latents = torch.randn(batch, channels, rows * patch, columns * patch)
    patches = patchify(latents, patch)
    assert patches.shape == (batch, rows * columns, channels * patch**2)
    assert torch.equal(unpatchify(patches, patch, rows * patch, columns * patch), latents)


def test_patches_stand_in_raster_order():
    latents = torch.arange(24.0).reshape(1, 1, 4, 6)
    patches = patchify(latents, 2)
    assert patches[0, 0].tolist() == [0, 1, 6, 7]
    assert patches[0, 1].tolist() == [2, 3, 8, 9]
    assert patches[0, 3].tolist() == [12, 13, 18, 19]


def test_sinusoids_have_their_closed_form():
    x = torch.tensor([0.0, 1.0, 250.0])
    waves = sinusoidal(x, 8, longest=100.0)
    for i, value in enumerate(x.tolist()):
        for j in range(4):
            angle = value * 100.0 ** (-j / 4)
            assert waves[i, j].item() == pytest.approx(math.cos(angle), abs=2e-5)
            assert waves[i, 4 + j].item() == pytest.approx(math.sin(angle), abs=2e-5)


def test_near_times_are_told_apart_and_far_ones_do_not_repeat():
    embed = shake(TimeEmbedding(32), seeded())
    out = embed(torch.linspace(0, 1, 101))
    assert out.shape == (101, 32)
    distance = torch.cdist(out, out) + torch.eye(101) * 1e3
    assert distance.min() > 1e-3


def test_places_start_from_nothing_and_can_tell_rows_from_columns():
    embedding = PatchEmbedding(channels=2, patch_size=1, hidden_size=16)
    same = torch.ones(1, 2, 3, 4)
    torch.nn.init.zeros_(embedding.place.weight)
    assert torch.equal(embedding(same), embedding.patch(patchify(same, 1)))
    torch.nn.init.eye_(embedding.place.weight)
    grid = (embedding(same) - embedding.patch(patchify(same, 1))).reshape(3, 4, 16)
    assert torch.equal(grid[0, :, 8:], grid[2, :, 8:])  # columns do not depend on the row
    assert torch.equal(grid[:, 0, :8], grid[:, 3, :8])
    assert not torch.equal(grid[0, 0, :8], grid[1, 0, :8])
    assert not torch.equal(grid[0, 0, 8:], grid[0, 1, 8:])


def test_a_pooled_prompt_is_a_perceptron_of_its_words_mean_value():
    pooled = PooledContext(6, 5, 4, 1e-6)
    pooled.initialize()
    values = torch.randn(2, 3, 7, 2, generator=seeded(1))
    assert torch.equal(pooled(values), torch.zeros(2, 1, 4))
    nn.init.normal_(pooled.outer.weight, generator=seeded(2))
    words = torch.arange(7)[None] < torch.tensor([[7], [3]])
    found = pooled(values, words)
    for row, number in enumerate((7, 3)):
        mean = torch.stack([values[row, :, word].flatten() for word in range(number)]).mean(dim=0)
        mean = mean / mean.square().mean().sqrt()
        expected = pooled.outer(functional.silu(pooled.inner(mean)))
        torch.testing.assert_close(found[row, 0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled(values)[:1], found[:1], rtol=0, atol=1e-6)
    values[1, :, 3:] = 99.0  # padding
    assert torch.equal(pooled(values, words), found)


def test_patches_may_be_larger_than_one_latent():
    embedding = shake(PatchEmbedding(channels=3, patch_size=2, hidden_size=16), seeded())
    assert embedding(torch.randn(2, 3, 4, 8)).shape == (2, 8, 16)
