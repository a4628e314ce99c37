"""Compiled groups draw what the others draw, from one graph, and a machine without a compiler goes on."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from latteflow.errors import UserError
from latteflow.models.compilation import runs_compiled
from toys import toy_pipeline

CLOSE = {"rtol": 0, "atol": 1e-4}


def draw(pipe, prompts=("a red circle",), **settings):
    settings = {"num_inference_steps": 8, "output_type": "latent", **settings}
    return pipe(list(prompts), generator=torch.Generator().manual_seed(0), **settings).images


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["probs", "logits", "none"])
def test_one_graph_serves_all_groups(mode):
    pipe = toy_pipeline(2, residual_attention=mode)
    plain = draw(pipe)
    assert not runs_compiled(pipe.transformer)
    counter = CompileCounter()
    pipe.compile(backend=counter)
    torch.testing.assert_close(draw(pipe), plain, **CLOSE)
    assert counter.frame_count == 1
    draw(pipe)
    assert counter.frame_count == 1
    assert runs_compiled(pipe.transformer)


def test_prompts_and_pictures_of_other_sizes_draw_the_same_too():
    pipe = toy_pipeline(2)
    calls = [
        {"prompts": ["a red circle"]},
        {"prompts": ["an emoji of a green square drawn in outline style", "a red circle"]},
        {"prompts": ["a red circle", "a blue square", "no"], "guidance_scale": 1.0},
        {"prompts": ["a red circle"], "height": 64},
    ]
    plain = [draw(pipe, **call) for call in calls]
    pipe.compile(backend="eager")
    for call, expected in zip(calls, plain, strict=True):
        torch.testing.assert_close(draw(pipe, **call), expected, **CLOSE)


def test_compiling_twice_is_refused():
    pipe = toy_pipeline(2)
    pipe.compile(backend="eager")
    with pytest.raises(UserError, match="compiled already"):
        pipe.compile(backend="eager")


def test_what_cannot_be_compiled_runs_as_it_is_with_one_warning(caplog):
    pipe = toy_pipeline(2)
    plain = draw(pipe)

    def broken(*_):
        raise RuntimeError("no such machine\nand more")

    pipe.compile(backend=broken)
    with caplog.at_level(logging.WARNING, logger="latteflow"):
        assert torch.equal(draw(pipe), plain)
        assert torch.equal(draw(pipe), plain)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("latteflow")]
    assert len(said) == 1
    assert "the groups cannot be compiled here" in said[0]
    assert "\n" not in said[0]
    assert not runs_compiled(pipe.transformer)


def test_gradients_go_past_the_compiled_groups():
    pipe = toy_pipeline(2)
    counter = CompileCounter()
    pipe.compile(backend=counter)
    context = pipe.encode_prompt(["a red circle"])
    pipe.transformer(torch.randn(1, 4, 4, 4), torch.tensor([0.1]), context).sum().backward()
    assert counter.frame_count == 0
    assert pipe.transformer.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.slow
def test_the_cpus_own_compiler_draws_the_same():
    """In a process of its own: the compiler leaves threads and settings behind."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be compiled" not in done.stderr


if __name__ == "__main__":
    pipe = toy_pipeline(2)
    plain = draw(pipe)
    pipe.compile()
    torch.testing.assert_close(draw(pipe), plain, **CLOSE)
