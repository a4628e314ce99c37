"""Pictures to latents and back, and the one place where latents are scaled."""

from types import SimpleNamespace

import pytest
import torch

from latteflow.errors import UserError
from latteflow.models.autoencoder import decode_latents, encode_pictures, small_autoencoder
from toys import seeded, toy_vae

NEUTRAL = SimpleNamespace(latents_mean=(), latents_std=())


def pictures(number=2, height=32, width=32):
    return torch.rand(number, 3, height, width, generator=seeded()) * 2 - 1


@pytest.mark.parametrize(
    ("widths", "layers", "factor"),
    [((8, 16), (0, 1), 2), ((8, 8, 16), (1, 1, 2), 4), ((8, 8, 16, 16), (0, 1, 1, 1), 8)],
)
def test_shrinks_by_two_a_stage(widths, layers, factor):
    vae = small_autoencoder(latent_channels=4, widths=widths, layers=layers)
    latents = vae.encode(pictures()).latent
    assert latents.shape == (2, 4, 32 // factor, 32 // factor)
    assert vae.spatial_compression_ratio == factor
    assert vae.decode(latents).sample.shape == (2, 3, 32, 32)


def test_statistics_make_latents_neutral():
    vae = toy_vae()
    raw = encode_pictures(vae, NEUTRAL, pictures(16))
    statistics = SimpleNamespace(latents_mean=raw.mean((0, 2, 3)).tolist(), latents_std=raw.std((0, 2, 3)).tolist())
    latents = encode_pictures(vae, statistics, pictures(16))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)


def test_decoding_undoes_what_encoding_scaled():
    vae = toy_vae()
    vae.register_to_config(scaling_factor=0.3)
    statistics = SimpleNamespace(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[0.1, 1.0, 3.0, 0.5])
    raw = vae.encode(pictures()).latent
    latents = encode_pictures(vae, statistics, pictures())
    mean, std = torch.tensor([statistics.latents_mean, statistics.latents_std])[:, None, :, None, None]
    torch.testing.assert_close(latents, (raw * 0.3 - mean) / std)
    torch.testing.assert_close(decode_latents(vae, statistics, latents), vae.decode(raw).sample, rtol=0, atol=1e-4)
    assert not torch.allclose(decode_latents(vae, NEUTRAL, latents), vae.decode(raw).sample, atol=1e-2)


@pytest.mark.parametrize(
    ("widths", "layers", "message"),
    [
        ((8, 16), (1, 1, 1), "a width and a block count a stage"),
        ((8,), (1,), "a width and a block count a stage"),
        ((8, 12), (1, 1), "8 and 12 do not"),
    ],
)
def test_stages_that_cannot_be_built_are_refused(widths, layers, message):
    with pytest.raises(UserError, match=message):
        small_autoencoder(latent_channels=4, widths=widths, layers=layers)
