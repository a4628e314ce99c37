"""Previews: a least-squares map, exact where the decoder is linear."""

from types import SimpleNamespace

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from latteflow.serve.engine import preview
from latteflow.serve.engine.preview import Preview

CHANNELS = 12


def linear_pair():
    """An autoencoder whose two halves are linear, and inverse to one another: 2x2 pixels of 3 colours a latent."""
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS))[0]

    def encode(vae, config, pictures):
        return rearrange(pictures, "b c (h i) (w j) -> b h w (c i j)", i=2, j=2).matmul(weight).permute(0, 3, 1, 2)

    def decode(latents):
        rows = latents.permute(0, 2, 3, 1) @ weight.T
        return rearrange(rows, "b h w (c i j) -> b c (h i) (w j)", i=2, j=2)

    return encode, decode


def test_a_linear_decoder_is_found(monkeypatch):
    encode, decode = linear_pair()
    monkeypatch.setattr(preview, "encode_pictures", encode)
    vae = SimpleNamespace(spatial_compression_ratio=2, device="cpu", dtype=torch.float32)
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(16)]
    fitted = Preview.fit(vae, None, images)
    latents = encode(vae, None, torch.rand(1, 3, 6, 12) * 2 - 1)
    expected = ((decode(latents)[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    shown = np.asarray(fitted(latents), dtype=np.float32)
    assert shown.shape == (6, 12, 3)
    assert np.abs(shown - expected).max() <= 3


def test_neighbours_count():
    """A decoder that smears a latent over its neighbours is told from one that does not."""
    weight = torch.zeros(9 * 1 + 1, 3)
    weight[3] = 1.0  # the latent to the left
    shown = np.asarray(Preview(weight, 1)(torch.tensor([[[[-1.0, 1.0, 1.0]]]])))
    assert shown[0, :, 0].tolist() == [0, 0, 255]
