"""The context: the prompt's keys and values, the same alone, padded, cached or recomputed."""

import pytest
import torch

from latteflow.models.backbones import family_of
from latteflow.models.context import Context, compute_context, concatenate
from toys import seeded

PROMPTS = ["a red circle", "an emoji of a green square drawn in outline style", "no"]


def words(tokenizer, prompts, side="right"):
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)
    return batch["input_ids"], batch["attention_mask"]


def fields(context):
    return (context.keys, context.values, context.mask, context.next_position)


def random_context(number, tokens, seed):
    keys, values = torch.randn(2, number, 4, 1, tokens, 16, generator=seeded(seed))
    mask = torch.ones(number, tokens, dtype=torch.bool)
    return Context(keys, values, mask, torch.full((number,), tokens))


def test_is_what_the_backbones_own_attention_reads(backbone, tokenizer):
    """Written out for the last layer: its norm, its projections and its rotary embedding of its own hidden states."""
    ids, mask = words(tokenizer, PROMPTS[:1])
    context = compute_context(backbone, ids, mask)
    hidden = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[3]
    layer = family_of(backbone.config).text_model(backbone).layers[3]
    normed = layer.input_layernorm(hidden)
    value = layer.self_attn.v_proj(normed)[:, None]
    key = layer.self_attn.k_proj(normed)[:, None]
    cos, sin = backbone.model.language_model.rotary_emb(hidden, torch.arange(ids.shape[1]).expand(3, 1, -1))
    key = key * cos[:, None] + torch.cat([-key[..., 8:], key[..., :8]], dim=-1) * sin[:, None]
    assert torch.equal(context.layer(3)[1], value)
    torch.testing.assert_close(context.layer(3)[0], key, rtol=0, atol=1e-6)
    assert context.keys.shape == (1, 4, 1, ids.shape[1], 16)


def test_padded_prompts_have_the_context_that_they_have_alone(backbone, tokenizer):
    together = compute_context(backbone, *words(tokenizer, PROMPTS))
    assert together.mask.sum(-1).tolist() == together.next_position.tolist()
    assert len(set(together.next_position.tolist())) == 3  # lengths differ: there is padding
    for number, prompt in enumerate(PROMPTS):
        alone = compute_context(backbone, *words(tokenizer, [prompt]))
        length = alone.mask.shape[1]
        torch.testing.assert_close(together.keys[number, :, :, :length], alone.keys[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.values[number, :, :, :length], alone.values[0], rtol=0, atol=1e-5)
        assert together.mask[number].tolist() == [True] * length + [False] * (together.mask.shape[1] - length)
        assert together.next_position[number] == length


def test_padding_in_front_is_refused(backbone, tokenizer):
    with pytest.raises(ValueError, match="padded at the end"):
        compute_context(backbone, *words(tokenizer, PROMPTS, side="left"))


def test_carries_no_gradient(tokenizer, backbone):
    ids, mask = words(tokenizer, PROMPTS)
    backbone.requires_grad_(True)
    try:
        assert not any(tensor.requires_grad for tensor in fields(compute_context(backbone, ids, mask)))
    finally:
        backbone.requires_grad_(False)


def test_concatenation_pads_to_the_longest_and_keeps_what_was_there():
    short, long = random_context(2, 3, 1), random_context(1, 5, 2)
    both = concatenate([short, long])
    assert len(both) == 3
    assert torch.equal(both.keys[:2, :, :, :3], short.keys)
    assert torch.equal(both.values[2:], long.values)
    assert not both.keys[:2, :, :, 3:].any()
    assert both.mask.tolist() == [[True] * 3 + [False] * 2] * 2 + [[True] * 5]
    assert both.next_position.tolist() == [3, 3, 5]


def test_selection_and_repetition_keep_rows_together():
    context = concatenate([random_context(2, 3, 1), random_context(1, 5, 2)])
    picked = context.select(torch.tensor([2, 0, 2]))
    for mine, all_of_them in zip(fields(picked), fields(context), strict=True):
        assert torch.equal(mine, all_of_them[[2, 0, 2]])
    by_mask = context.select(torch.tensor([True, False, True]))
    assert by_mask.next_position.tolist() == [3, 5]
    twice = context.repeat_interleave(2)
    assert torch.equal(twice.values, context.values[[0, 0, 1, 1, 2, 2]])
    assert twice.next_position.tolist() == [3, 3, 3, 3, 5, 5]


def test_a_dtype_changes_keys_and_values_alone_and_moves_nothing():
    context = random_context(2, 3, 1)
    half = context.to(torch.bfloat16)
    assert half.keys.dtype == half.values.dtype == torch.bfloat16
    assert half.mask.dtype == torch.bool
    assert half.next_position.dtype == torch.int64
    elsewhere = context.to("meta")
    assert {tensor.device.type for tensor in fields(elsewhere)} == {"meta"}
    assert {tensor.device.type for tensor in fields(elsewhere.to(torch.bfloat16))} == {"meta"}
    assert elsewhere.to(dtype=torch.bfloat16).mask.dtype == torch.bool
