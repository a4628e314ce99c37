"""The cost table: what is counted against what is reckoned, K against Vanilla, and the page in the repository."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import families
from latteflow.errors import UserError
from latteflow.evaluate import cost_table as table
from latteflow.models.context import compute_context
from latteflow.models.presets import preset_names
from latteflow.models.transformer import LatteFlowTransformer

PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / table.PAGE
NAME = "smolvlm-256m"


@pytest.fixture(scope="module")
def rows():
    return table.cost_table([NAME])


def test_a_preset_stands_beside_its_vanilla(rows):
    experts, vanilla = rows
    assert [(row.preset, row.groups, row.layers_per_step) for row in rows] == [(NAME, 5, 6), (NAME, 1, 30)]
    assert experts.total_parameters == experts.frozen_parameters + experts.trainable_parameters
    # Vanilla has four gates more, of layers that begin a group in the other, and needs all layers at every step.
    assert 0 < vanilla.trainable_parameters - experts.trainable_parameters < 1e-3 * vanilla.trainable_parameters
    assert vanilla.active_parameters == vanilla.trainable_parameters
    assert experts.active_parameters < vanilla.active_parameters / 4
    assert experts.of_vanilla == experts.step_flops / vanilla.step_flops == pytest.approx(1 / 5, rel=0.02)
    assert vanilla.of_vanilla == 1
    for name in ("frozen_parameters", "prefill_flops", "decode_flops", "context_bytes"):
        assert getattr(experts, name) == getattr(vanilla, name)


def test_the_counter_counts_what_the_formulas_say(rows):
    for row in rows:
        assert row.step_flops_counted == row.step_flops > 0
        assert row.prefill_flops_counted == row.prefill_flops > 0


def test_a_row_holds_the_published_sizes(rows):
    for row in rows:
        assert row.frozen_parameters == 256_484_928 + 312_250_275  # SmolVLM-256M and SANA's autoencoder
        assert row.context_bytes == 32 * 2 * 30 * 3 * 64 * 2  # tokens, keys and values, layers, heads, width, bytes
        assert row.image_flops == row.prefill_flops + 40 * row.step_flops + row.decode_flops


@pytest.mark.parametrize("variant", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_counting_on_the_meta_device_counts_what_running_does(variant):
    backbone = families.build(families.toy_config(variant))
    backbone.set_attn_implementation("eager")
    replica = LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4, sample_size=4)
    with FlopCounterMode(display=False) as prefill:
        context = compute_context(backbone, torch.full((1, 9), 90), torch.ones(1, 9, dtype=torch.int64))
    with FlopCounterMode(display=False) as step, torch.no_grad():
        replica(torch.randn(1, 4, 4, 4), torch.tensor([0.2]), context)
    found, counted = table._prefill(backbone.to("meta"), 9)
    assert counted == prefill.get_total_flops()
    assert found.keys.shape == context.keys.shape
    assert table._step_counted(replica.to("meta"), found, 4) == step.get_total_flops()


def test_the_page_in_the_repository_is_what_the_command_writes(rows):
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    header, _, *cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert tuple(header) == table._COLUMNS
    assert [cell[0] for cell in cells] == [f"{name}{kind}" for name in preset_names() for kind in ("", ", Vanilla")]
    assert [cell for cell in cells if cell[0].startswith(NAME)] == [table.row_cells(row) for row in rows]
    without_rows = [line for line in lines if not line.startswith("| ")]
    written = table.cost_page(rows).splitlines()
    assert without_rows == [line for line in written if not line.startswith("| ")]
    assert all(float(cell[7]) == 1 for cell in cells if cell[0].endswith("Vanilla"))


@pytest.mark.slow
def test_every_row_of_the_page_is_what_the_command_writes():
    assert PAGE.read_text(encoding="utf-8") == table.cost_page(table.cost_table())


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="no preset 'gpt-5'"):
        table.cost_table(["gpt-5"])


def test_the_page_names_its_conditions(rows):
    page = table.cost_page([replace(rows[0], steps=10)], 8)
    assert "10 steps, guided (two sequences a step), a prompt of 8 tokens" in page
