"""benchmarks/train_step.py: the slice is one group of the whole, and its operations are what the formula says."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import train_step

from latteflow.models.presets import preset


def options(**changes):
    settings = {"preset": "smolvlm-256m", "layers": 2, "size": 128, "context": 8, "batch": 2, "steps": 1, "threads": 1}
    return Namespace(**{**settings, "note": "", **changes})


@pytest.mark.parametrize("name", ["qwen2-vl-2b", "smolvlm-256m"])
def test_the_slice_is_one_group_of_the_whole(name):
    whole = preset(name)
    slice_ = train_step.cut(whole, whole.group_size)
    assert (slice_.num_layers, slice_.num_groups) == (whole.group_size, 1)
    assert preset(name) == whole
    flops, memory = train_step.formulas(slice_, options(), 2)
    every_flops, every_memory = train_step.formulas(whole, options(), 2)
    assert flops == every_flops  # a sample passes through one group
    io = whole.num_groups * memory.trainable_parameters - every_memory.trainable_parameters
    assert 0 < io < 0.2 * every_memory.trainable_parameters  # what groups share is in each slice
    assert memory.frozen_bytes == every_memory.frozen_bytes == 0


def test_a_step_is_counted_and_told():
    found = train_step.run(options())
    flops, memory = train_step.formulas(train_step.cut(preset("smolvlm-256m"), 2), options(), 2)
    # Neither the latents nor the context have a gradient.
    assert 0.95 * flops < found["counted"] < flops
    assert len(found["passes"]) == len(found["updates"]) == 1
    assert min(found["matrix_rate"], *found["passes"], *found["updates"]) > 0
    page = train_step.report(options(), {**found, "in_use_bytes": memory.peak_bytes, "passes": [3.0], "updates": [1.0]})
    assert "| GB at the peak, in use |" in page
    assert "| step | 4.000 (4.000 to 4.000) | 100% |" in page
    assert "0.500 images/s" in page
    assert "| all 5 x 6 layers, one GPU | not measured | not measured |" in page
    assert f"MFU (operations by formula / time / that rate): {2 * flops / 4 / found['matrix_rate']:.1%}" in page


def test_the_command_on_the_page_is_the_one_that_was_run():
    words = train_step.arguments(options(size=256))
    assert words[words.index("--size") + 1] == "256"
    assert "--out" not in words
