"""Floating-point operations by formula. A multiply-add counts as two; norms, activations and softmax are left out."""

from __future__ import annotations

from torch import nn

from latteflow.models.transformer import LatteFlowTransformer


def step_flops(replica: LatteFlowTransformer, image_tokens: int, context_tokens: int) -> float:
    """Return the operations of one network call on one sequence, by formula.

    Every weight matrix but those that see the time embedding alone is used once a token; each layer's attention makes
    two products of every head's queries (N) with all keys (T + N).
    """
    config = replica.config
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    key_values = config.num_key_value_heads * config.head_dim
    attention = 2 * width * heads + 2 * width * key_values
    feed_forward = 3 * width * config.intermediate_size
    layer = image_tokens * (attention + feed_forward)  # multiply-adds, as below
    layer += 2 * image_tokens * (image_tokens + context_tokens) * heads
    gates = 0 if config.residual_attention == "none" else config.num_attention_heads
    time = config.time_embedding_size
    modulation = 4 * width * time
    latent = config.latent_channels * config.patch_size**2
    around = image_tokens * (2 * latent * width + width * width) + 2 * time * time + 2 * width * time
    group = replica.group_size * (layer + modulation) + (replica.group_size - 1) * gates * time
    return 2.0 * (group + around)


def prefill_flops(backbone: nn.Module, tokens: int) -> float:
    """Return the operations of reading a prompt of so many tokens, with the scores of one next token, by formula."""
    text = backbone.config.get_text_config()  # type: ignore[union-attr, operator]
    width = text.hidden_size
    head_dim = getattr(text, "head_dim", None) or width // text.num_attention_heads
    heads, key_values = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    layer = tokens * (2 * width * heads + 2 * width * key_values + 3 * width * text.intermediate_size)
    return 2.0 * (text.num_hidden_layers * (layer + 2 * tokens * tokens * heads) + width * text.vocab_size)
