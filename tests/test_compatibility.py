"""What an earlier release saved loads for ever, and draws what it drew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latteflow import LatteFlowPipeline

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("release", ["0.1.0"])
def test_a_pipeline_saved_by_an_earlier_release_draws_the_same(release):
    pipe = LatteFlowPipeline.from_pretrained(FIXTURES / f"pipeline-{release}")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    drawn = pipe("a red circle", num_inference_steps=4, generator=generator, output_type="latent").images
    expected = load_file(FIXTURES / f"pipeline-{release}-drawn.safetensors")["latents"]
    # Not bit by bit: the order of float32 sums is the processor's.
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
