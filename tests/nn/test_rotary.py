"""Rotary positions are the backbone's, bit for bit, also where time, height and width differ."""

import pytest
import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, apply_rotary_pos_emb

from latteflow.nn.rotary import axes_of_frequencies, grid_positions, rotary_cos_sin, rotate
from toys import seeded

SIZES = [(16, (2, 3, 3), 1e4), (128, (16, 24, 24), 1e6)]


def positions_of(kind):
    if kind == "words":
        return torch.arange(7).expand(3, 2, 7)
    if kind == "grid":
        return grid_positions(torch.tensor([3, 11]), 3, 2)
    return torch.randint(0, 300, (3, 2, 9), generator=seeded())


@pytest.mark.parametrize(("head_dim", "sections", "theta"), SIZES)
@pytest.mark.parametrize("kind", ["words", "grid", "any"])
def test_turns_heads_exactly_as_the_backbone_does(head_dim, sections, theta, kind):
    positions = positions_of(kind)
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}
    config = Qwen2VLTextConfig(hidden_size=2 * head_dim, num_attention_heads=2, rope_parameters=rope)
    query = torch.randn(2, 2, positions.shape[-1], head_dim, generator=seeded(1))
    key = torch.randn(2, 1, positions.shape[-1], head_dim, generator=seeded(2))
    embedding = Qwen2VLRotaryEmbedding(config)(query, positions)
    expected = apply_rotary_pos_emb(query, key, *embedding)

    cos, sin = rotary_cos_sin(
        positions, head_dim=head_dim, theta=theta, axes=axes_of_frequencies(sections, interleaved=False)
    )
    assert torch.equal(rotate(query, cos, sin), expected[0])
    assert torch.equal(rotate(key, cos, sin), expected[1])


def test_a_grid_follows_the_prompt_in_raster_order():
    time, rows, columns = grid_positions(torch.tensor([5, 0]), 2, 3)
    assert time.tolist() == [[5] * 6, [0] * 6]
    assert rows.tolist() == [[5, 5, 5, 6, 6, 6], [0, 0, 0, 1, 1, 1]]
    assert columns.tolist() == [[5, 6, 7, 5, 6, 7], [0, 1, 2, 0, 1, 2]]


def test_scores_depend_on_differences_of_positions_only():
    query, key = torch.randn(2, 1, 1, 4, 16, generator=seeded(), dtype=torch.float64)
    scores = []
    for start in (0, 40):
        cos, sin = rotary_cos_sin(
            grid_positions(torch.tensor([start]), 2, 2),
            head_dim=16,
            theta=1e4,
            axes=axes_of_frequencies((2, 3, 3), interleaved=False),
        )
        scores.append(rotate(query, cos, sin) @ rotate(key, cos, sin).mT)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-4)  # angles are float32
