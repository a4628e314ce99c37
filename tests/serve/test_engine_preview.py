"""Previews: a least-squares map, exact where the decoder is linear."""

from types import SimpleNamespace

import numpy as np
import torch
from einops import rearrange

from latteflow.serve.engine import preview
from latteflow.serve.engine.preview import Preview, latents_for_fitting


def test_a_linear_decoder_is_found(monkeypatch):
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 3 * 4) * 0.05, torch.randn(3 * 4) * 0.05

    def decode(vae, config, latents):
        rows = rearrange(latents, "b c h w -> b h w c") @ weight + bias
        return rearrange(rows, "b h w (c i j) -> b c (h i) (w j)", i=2, j=2)

    monkeypatch.setattr(preview, "decode_latents", decode)
    vae = SimpleNamespace(spatial_compression_ratio=2, device="cpu", dtype=torch.float32)
    fitted = Preview.fit(vae, None, latents_for_fitting(5, 4, 4))
    latents = torch.randn(1, 5, 3, 6)
    expected = ((decode(None, None, latents)[0].clamp(-1, 1) + 1) * 127.5).round()
    shown = np.asarray(fitted(latents), dtype=np.float32)
    assert shown.shape == (6, 12, 3)
    assert np.abs(shown - expected.permute(1, 2, 0).numpy()).max() <= 2


def test_latents_for_fitting_are_normalised():
    latents = latents_for_fitting(4, 8, 8)
    assert abs(latents.std().item() - 1) < 0.1
    assert abs(latents.mean().item()) < 0.1
    assert latents.shape[1:] == (4, 8, 8)
