"""Rotary positions are the backbones', bit for bit, also where time, height and width differ."""

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from latteflow.nn.rotary import axes_of_frequencies, grid_positions, raster_positions, rotary_cos_sin, rotate
from toys import seeded

SIZES = [(16, (2, 3, 3), 1e4), (128, (16, 24, 24), 1e6)]
INTERLEAVED = [(16, (4, 2, 2), 1e4), (24, (4, 4, 4), 1e5), (128, (24, 20, 20), 5e6)]


def positions_of(kind):
    if kind == "words":
        return torch.arange(7).expand(3, 2, 7)
    if kind == "grid":
        return grid_positions(torch.tensor([3, 11]), 3, 2)
    return torch.randint(0, 300, (3, 2, 9), generator=seeded())


def assert_turns_alike(positions, head_dim, cos_sin, theirs):
    query = torch.randn(2, 2, positions.shape[-1], head_dim, generator=seeded(1))
    key = torch.randn(2, 1, positions.shape[-1], head_dim, generator=seeded(2))
    expected = apply_rotary_pos_emb(query, key, *theirs)
    assert torch.equal(rotate(query, *cos_sin), expected[0])
    assert torch.equal(rotate(key, *cos_sin), expected[1])


@pytest.mark.parametrize(("head_dim", "sections", "theta"), SIZES)
@pytest.mark.parametrize("kind", ["words", "grid", "any"])
def test_turns_heads_exactly_as_qwen2_vl_does(head_dim, sections, theta, kind):
    positions = positions_of(kind)
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}
    config = Qwen2VLTextConfig(hidden_size=2 * head_dim, num_attention_heads=2, rope_parameters=rope)
    theirs = Qwen2VLRotaryEmbedding(config)(torch.zeros(1), positions)
    axes = axes_of_frequencies(sections, interleaved=False)
    assert_turns_alike(
        positions, head_dim, rotary_cos_sin(positions, head_dim=head_dim, theta=theta, axes=axes), theirs
    )


@pytest.mark.parametrize(("head_dim", "sections", "theta"), INTERLEAVED)
@pytest.mark.parametrize("kind", ["words", "grid", "any"])
def test_turns_heads_exactly_as_qwen3_vl_does(head_dim, sections, theta, kind):
    positions = positions_of(kind)
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}
    config = Qwen3VLTextConfig(hidden_size=64, num_attention_heads=2, head_dim=head_dim, rope_parameters=rope)
    theirs = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), positions)
    axes = axes_of_frequencies(sections, interleaved=True)
    assert_turns_alike(
        positions, head_dim, rotary_cos_sin(positions, head_dim=head_dim, theta=theta, axes=axes), theirs
    )
    if kind == "any":  # the other order of sections is another rotation
        other = rotary_cos_sin(
            positions, head_dim=head_dim, theta=theta, axes=axes_of_frequencies(sections, interleaved=False)
        )
        assert not torch.allclose(other[0], theirs[0], atol=1e-2)


@pytest.mark.parametrize("factor", [1.0, 4.0, 3.0])
def test_turns_heads_of_one_axis_exactly_as_llama_does(factor):
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": 1e5}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope)
    positions = raster_positions(torch.tensor([3, 200]), 3, 2)
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[0])
    assert_turns_alike(positions, 32, rotary_cos_sin(positions, head_dim=32, theta=1e5, factor=factor), theirs)


def test_turns_heads_exactly_as_gemmas_two_kinds_of_layers_do():
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    module = Gemma3RotaryEmbedding(Gemma3TextConfig(num_hidden_layers=6, head_dim=32, rope_parameters=rope))
    positions = torch.randint(2000, (1, 2, 9), generator=seeded())
    for kind, theta, factor in (("sliding_attention", 1e4, 1.0), ("full_attention", 1e6, 8.0)):
        theirs = module(torch.zeros(1), positions[0], kind)
        assert_turns_alike(positions, 32, rotary_cos_sin(positions, head_dim=32, theta=theta, factor=factor), theirs)


def test_a_grid_follows_the_prompt_in_raster_order():
    time, rows, columns = grid_positions(torch.tensor([5, 0]), 2, 3)
    assert time.tolist() == [[5] * 6, [0] * 6]
    assert rows.tolist() == [[5, 5, 5, 6, 6, 6], [0, 0, 0, 1, 1, 1]]
    assert columns.tolist() == [[5, 6, 7, 5, 6, 7], [0, 1, 2, 0, 1, 2]]


def test_with_one_axis_a_grid_is_a_row_of_tokens_behind_the_prompt():
    positions = raster_positions(torch.tensor([5, 0]), 2, 3)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [[[5, 6, 7, 8, 9, 10], [0, 1, 2, 3, 4, 5]]]
    assert torch.equal(positions, raster_positions(torch.tensor([5, 0]), 3, 2))  # as many tokens, whatever the shape


@pytest.mark.parametrize(
    ("sections", "interleaved", "axes"),
    [
        ((2, 3, 3), False, [0, 0, 1, 1, 1, 2, 2, 2]),
        ((4, 2, 2), True, [0, 1, 2, 0, 1, 2, 0, 0]),
        ((2, 2, 2), True, [0, 1, 2, 0, 1, 2]),
        ((3, 2, 1), True, [0, 1, 2, 0, 1, 0]),
        ((24, 20, 20), True, [0, 1, 2] * 20 + [0] * 4),
        ((), False, []),
        ((), True, []),
    ],
    ids=str,
)
def test_each_axis_turns_the_frequencies_of_its_section(sections, interleaved, axes):
    found = axes_of_frequencies(sections, interleaved=interleaved)
    assert found == axes
    assert [found.count(axis) for axis in range(len(sections))] == list(sections)


@pytest.mark.parametrize(("theta", "factor"), [(1e4, 1.0), (1e6, 8.0)])
def test_angles_are_positions_times_a_falling_series_of_frequencies(theta, factor):
    """The closed form, in float64: position / factor · theta^(-2 i / head_dim), once for each half of the head."""
    positions = torch.tensor([[[0, 1, 7, 300]]])
    cos, sin = rotary_cos_sin(positions, head_dim=8, theta=theta, factor=factor)
    frequencies = theta ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = positions[0, 0, :, None] / factor * frequencies
    both = torch.cat([angles, angles], dim=-1)[None]
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), both.cos(), rtol=0, atol=5e-5)  # angles are float32
    torch.testing.assert_close(sin.double(), both.sin(), rtol=0, atol=5e-5)
    assert (cos[0, 0] == 1).all()
    assert (sin[0, 0] == 0).all()


def test_a_factor_stretches_positions():
    positions = torch.arange(0, 64, 4)[None, None]
    stretched = rotary_cos_sin(positions, head_dim=16, theta=1e4, factor=4.0)
    plain = rotary_cos_sin(positions // 4, head_dim=16, theta=1e4)
    for mine, theirs in zip(stretched, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_several_axes_without_a_split_of_the_frequencies_are_a_mistake():
    with pytest.raises(ValueError, match="too many values"):
        rotary_cos_sin(positions_of("grid"), head_dim=16, theta=1e4)


def test_scores_depend_on_differences_of_positions_only():
    query, key = torch.randn(2, 1, 1, 4, 16, generator=seeded(), dtype=torch.float64)
    for place, axes in ((grid_positions, axes_of_frequencies((2, 3, 3), interleaved=False)), (raster_positions, [])):
        scores = []
        for start in (0, 40):
            cos, sin = rotary_cos_sin(place(torch.tensor([start]), 2, 2), head_dim=16, theta=1e4, axes=axes)
            scores.append(rotate(query, cos, sin) @ rotate(key, cos, sin).mT)
        torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-4)  # angles are float32
