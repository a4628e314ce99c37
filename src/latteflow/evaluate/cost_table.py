"""The cost of every preset beside its Vanilla (K = 1, all layers at every step): the row the reviewers missed.

Operations are given twice: by the formulas of ``models/flops.py``, and as PyTorch's counter counts them when the parts
are run on the meta device, where nothing is allocated and nothing computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from latteflow.evaluate.cost import PROMPT_TOKENS, active_parameters, decode_flops
from latteflow.evaluate.memory import context_token_bytes
from latteflow.models.backbones import family_of
from latteflow.models.context import Context, context_of_cache
from latteflow.models.flops import prefill_flops, step_flops
from latteflow.models.presets import Preset, build_autoencoder, build_backbone, build_transformer, preset, preset_names
from latteflow.models.transformer import LatteFlowTransformer

STEPS = 40
PAGE = "cost.md"
"""Of benchmarks/results."""


@dataclass(frozen=True)
class CostRow:
    """What one picture of a preset costs; every number of operations is of both sequences of guidance."""

    preset: str
    groups: int
    """K; 1 is Vanilla."""
    layers_per_step: int
    """M."""
    total_parameters: int
    frozen_parameters: int
    """Backbone and autoencoder."""
    trainable_parameters: int
    """The replica, all groups."""
    active_parameters: int
    """What one network call reads of the replica."""
    step_flops: float
    """By formula; a multiply-add is two operations."""
    step_flops_counted: float
    prefill_flops: float
    """Of the prompt; the empty prompt's context is kept across calls."""
    prefill_flops_counted: float
    decode_flops: float
    """Counted: convolutions have no short formula."""
    steps: int
    context_bytes: int
    """Keys and values of one prompt, in bfloat16."""
    of_vanilla: float = 1.0
    """Operations of a step, as a part of Vanilla's."""

    @property
    def image_flops(self) -> float:
        """Return the operations of a picture, by formula: prompt, all steps, decoder."""
        return self.prefill_flops + self.steps * self.step_flops + self.decode_flops


def cost_table(
    names: Sequence[str] | None = None, *, steps: int = STEPS, prompt_tokens: int = PROMPT_TOKENS
) -> list[CostRow]:
    """Return two rows a preset: as it is, and with K = 1.

    Args:
        names: of presets; left out, all.
        steps: network calls a picture.
        prompt_tokens: length of the prompt.

    Raises:
        UserError: there is no preset of such a name.
    """
    rows = []
    for chosen in map(preset, preset_names() if names is None else names):
        rows += _rows_of(chosen, steps, prompt_tokens)
    return rows


def _rows_of(chosen: Preset, steps: int, prompt_tokens: int) -> list[CostRow]:
    backbone, vae = build_backbone(chosen), build_autoencoder(chosen.autoencoder)
    side = chosen.picture_size // vae.spatial_compression_ratio
    backbone.set_attn_implementation("eager")  # other kinds of attention have no formula in the counter
    context, prefill_counted = _prefill(backbone, prompt_tokens)
    frozen = sum(p.numel() for part in (backbone, vae) for p in part.parameters())
    decoded = decode_flops(vae, side)
    rows = []
    for size in (chosen.group_size, chosen.num_layers):
        replica = build_transformer(chosen, backbone, group_size=size)
        trainable = sum(p.numel() for p in replica.parameters())
        tokens = (side // replica.config.patch_size) ** 2
        rows.append(
            CostRow(
                preset=chosen.name,
                groups=chosen.num_layers // size,
                layers_per_step=size,
                total_parameters=frozen + trainable,
                frozen_parameters=frozen,
                trainable_parameters=trainable,
                active_parameters=active_parameters(replica),
                step_flops=2 * step_flops(replica, tokens, prompt_tokens),
                step_flops_counted=2 * _step_counted(replica, context, side),
                prefill_flops=prefill_flops(backbone, prompt_tokens),
                prefill_flops_counted=prefill_counted,
                decode_flops=decoded,
                steps=steps,
                context_bytes=prompt_tokens * context_token_bytes(replica, backbone.dtype),
            )
        )
    experts, vanilla = rows
    return [replace(experts, of_vanilla=experts.step_flops / vanilla.step_flops), vanilla]


@torch.no_grad()
def _prefill(backbone: Any, tokens: int) -> tuple[Context, float]:
    """Return the context of a prompt on the meta device, and the operations that were counted."""
    text, words = backbone.config.get_text_config(), torch.zeros(1, tokens, dtype=torch.int64)
    positions, following = family_of(backbone.config).positions(backbone, words, torch.ones_like(words), {})
    cache = DynamicCache(config=text)
    with FlopCounterMode(display=False) as counter:
        backbone(
            input_ids=words.to("meta"),
            position_ids=positions.to("meta"),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    mask = torch.ones(1, tokens, dtype=torch.bool)  # on the CPU: whether a prompt is padded is looked up
    return context_of_cache(cache, mask, following.to("meta")), float(counter.get_total_flops())


@torch.no_grad()
def _step_counted(replica: LatteFlowTransformer, context: Context, side: int) -> float:
    """Return the operations of the first expert's call on one sequence, as counted."""
    x_t = torch.zeros(1, replica.config.latent_channels, side, side, dtype=replica.dtype, device="meta")
    with FlopCounterMode(display=False) as counter:
        replica.expert(0, x_t, 0.0, context)
    return float(counter.get_total_flops())


def cost_page(rows: Sequence[CostRow], prompt_tokens: int = PROMPT_TOKENS) -> str:
    """Return the table as a Markdown page.

    Args:
        rows: of ``cost_table``.
        prompt_tokens: that they were reckoned with.
    """
    side = preset(rows[0].preset).picture_size
    lines = [
        "# What a picture costs, beside Vanilla",
        "",
        "`latteflow evaluate --cost`",
        "",
        f"{side}x{side}, {rows[0].steps} steps, guided (two sequences a step), a prompt of {prompt_tokens} tokens, "
        "bfloat16. Vanilla is the same model with K = 1: all layers at every step. Nothing here is measured: "
        "parameters are counted and operations reckoned on the meta device, without weights. G is 10^9, a multiply-add "
        "two operations.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + " --- |" * len(_COLUMNS),
        *("| " + " | ".join(row_cells(row)) + " |" for row in rows),
        "",
        "- Parameters: all parts; frozen (backbone and autoencoder); trainable (the replica, all groups); active (what "
        "one network call reads of the replica).",
        "- A step, a prompt: by formula ([`models/flops.py`](../../src/latteflow/models/flops.py)) and, after the "
        "slash, as `torch.utils.flop_counter` counts the parts run on the meta device.",
        "- A picture: the prompt, all steps and the decoder, which is counted. The empty prompt is read once for all "
        "calls.",
        "- Of Vanilla: operations of a step, over those of the row with K = 1.",
        "- Context: keys and values of one prompt.",
    ]
    return "\n".join(lines) + "\n"


_COLUMNS = (
    "preset",
    "K x M",
    "parameters",
    "frozen",
    "trainable",
    "active",
    "GFLOP a step",
    "of Vanilla",
    "GFLOP a prompt",
    "GFLOP a decoder",
    "GFLOP a picture",
    "context",
)


def row_cells(row: CostRow) -> list[str]:
    """Return a row of the page."""
    name = row.preset if row.groups > 1 else f"{row.preset}, Vanilla"
    numbers = (row.total_parameters, row.frozen_parameters, row.trainable_parameters, row.active_parameters)
    return [
        name,
        f"{row.groups} x {row.layers_per_step}",
        *(f"{number / 1e6:,.0f}M" for number in numbers),
        f"{row.step_flops / 1e9:,.2f} / {row.step_flops_counted / 1e9:,.2f}",
        f"{row.of_vanilla:.4f}",
        f"{row.prefill_flops / 1e9:,.2f} / {row.prefill_flops_counted / 1e9:,.2f}",
        f"{row.decode_flops / 1e9:,.1f}",
        f"{row.image_flops / 1e9:,.0f}",
        f"{row.context_bytes / 1e6:.2f} MB",
    ]
