"""Models of transformers and diffusers at their published sizes, random weights, each in its own library's classes.

What every class does in a step is what its library's pipeline does, less the scheduler's arithmetic (of ours too).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, SanaTransformer2DModel
from torch import nn
from transformers import JanusConfig, JanusForConditionalGeneration, StaticCache

from latteflow.benchmark.case import Case, count, matrix_numbers
from latteflow.benchmark.ours import random_autoencoder
from latteflow.benchmark.weights import with_random_weights

JANUS_PRO_1B: Mapping[str, Any] = {
    "text_config": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 102400,
        "max_position_embeddings": 16384,
    },
    "vision_config": {"hidden_size": 1024, "num_image_tokens": 576, "projection_dim": 2048},
    "vq_config": {"projection_dim": 2048, "image_token_embed_dim": 2048},
}
DIT_XL_2: Mapping[str, Any] = {"out_channels": 8}
"""The class's own defaults are DiT-XL/2 but for the channels out: noise and its variance."""
SD_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 256,
}
SANA_1_6B: Mapping[str, Any] = {"sample_size": 32}
"""The class's own defaults are SANA-1.6B."""

_JANUS_PROMPT, _JANUS_GUIDANCE = 32, 5.0
_SANA_PROMPT, _SANA_GUIDANCE = 300, 4.5
_DIT_GUIDANCE = 4.0


def janus_case(device: torch.device, dtype: torch.dtype, *, geometry: Mapping[str, Any] = JANUS_PRO_1B) -> Case:
    """Return Janus-Pro's drawing: 576 tokens one after the other, each of two sequences, then the VQ decoder.

    Args:
        device: where.
        dtype: of everything.
        geometry: arguments of ``JanusConfig``.
    """
    config: Any = JanusConfig(**geometry)
    model = with_random_weights(lambda: _without_eyes(config), device, dtype)
    inner, tokens = model.model, config.vision_config.num_image_tokens
    language, keys = inner.language_model, _JANUS_PROMPT + config.vision_config.num_image_tokens
    cache = StaticCache(config=config.text_config, max_cache_len=keys)
    drawn = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    first = torch.randn(2, 1, config.text_config.hidden_size, device=device, dtype=dtype)
    state: dict[str, Any] = {"embedding": first, "number": tokens}  # all drawn: a step begins with the prompt

    @torch.no_grad()
    def prefill() -> torch.Tensor:
        cache.reset()
        words = torch.arange(3, 3 + _JANUS_PROMPT, device=device).repeat(2, 1) % config.text_config.vocab_size
        state["number"] = 0
        return language(input_ids=words, past_key_values=cache, use_cache=True).last_hidden_state

    @torch.no_grad()
    def step(number: int) -> torch.Tensor:
        if state["number"] == tokens:
            prefill()
        at = state["number"]
        hidden = language(inputs_embeds=state["embedding"], past_key_values=cache, use_cache=True).last_hidden_state
        conditional, unconditional = inner.generation_head(hidden[:, -1]).chunk(2)
        scores = unconditional + _JANUS_GUIDANCE * (conditional - unconditional)
        token = torch.multinomial(torch.softmax(scores.float(), dim=-1), 1)
        drawn[:, at] = token[:, 0]
        state["embedding"], state["number"] = model.prepare_embeddings_for_image_generation(token.repeat(2, 1)), at + 1
        return scores

    @torch.no_grad()
    def decode() -> torch.Tensor:
        return model.decode_image_tokens(drawn)

    parts = (language.layers, inner.generation_head, inner.generation_aligner)
    attention = 2 * config.text_config.num_hidden_layers * keys * config.text_config.hidden_size
    active = sum(map(count, parts))
    return Case(
        name="Janus-Pro-1B",
        what="transformers' JanusForConditionalGeneration, parts as its generate calls them, StaticCache; VQ decoder",
        resolution=config.vision_config.image_size,
        tokens=tokens,
        steps=tokens,
        passes=2,
        parameters=active + count(language.embed_tokens),
        active_parameters=active,
        step_flops=2.0 * 2 * (matrix_numbers(*parts) + attention),
        weight_bytes=active * dtype.itemsize,
        step=step,
        prefill=prefill,
        decode=decode,
        blocks=list(language.layers),
    )


def dit_case(
    device: torch.device,
    dtype: torch.dtype,
    *,
    geometry: Mapping[str, Any] = DIT_XL_2,
    autoencoder: Mapping[str, Any] = SD_VAE,
    steps: int = 250,
) -> Case:
    """Return DiT-XL/2's drawing: guided steps over 32x32 latents, then Stable Diffusion's decoder.

    Args:
        device: where.
        dtype: of everything.
        geometry: arguments of ``DiTTransformer2DModel``.
        autoencoder: arguments of ``AutoencoderKL``.
        steps: of a picture.
    """
    model: Any = with_random_weights(lambda: DiTTransformer2DModel(**geometry), device, dtype)
    vae: Any = with_random_weights(lambda: AutoencoderKL(**autoencoder), device, dtype)
    config = model.config
    side, channels = config.sample_size, config.in_channels
    latents = torch.randn(1, channels, side, side, device=device, dtype=dtype)
    classes = torch.tensor([1, config.num_embeds_ada_norm], device=device)

    def step(number: int) -> torch.Tensor:
        with torch.no_grad():
            times = torch.full((2,), 999 - number % steps, device=device)
            out = model(latents.repeat(2, 1, 1, 1), timestep=times, class_labels=classes).sample
            conditional, unconditional = out[:, :channels].chunk(2)
            return unconditional + _DIT_GUIDANCE * (conditional - unconditional)

    def decode() -> torch.Tensor:
        with torch.no_grad():
            return vae.decode(latents).sample

    tokens, width = (side // config.patch_size) ** 2, config.num_attention_heads * config.attention_head_dim
    blocks = list(model.transformer_blocks)
    each_token = matrix_numbers(*(part for block in blocks for part in (block.attn1, block.ff)), model.proj_out_2)
    each_token += model.pos_embed.proj.weight.numel()
    # The blocks embed t and the class one by one, and the last norm asks the first block's once more.
    once = matrix_numbers(*(block.norm1 for block in blocks), blocks[0].norm1.emb, model.proj_out_1)
    attention = len(blocks) * 2 * tokens * tokens * width
    return Case(
        name="DiT-XL/2",
        what=f"diffusers' DiTTransformer2DModel as DiTPipeline calls it, class guidance {_DIT_GUIDANCE:g}; "
        "AutoencoderKL decoder",
        resolution=side * 8,
        tokens=tokens,
        steps=steps,
        passes=2,
        parameters=count(model),
        active_parameters=count(model),
        step_flops=2.0 * 2 * (tokens * each_token + once + attention),
        weight_bytes=count(model) * dtype.itemsize,
        step=step,
        decode=decode,
        blocks=blocks,
    )


def sana_case(
    device: torch.device,
    dtype: torch.dtype,
    *,
    geometry: Mapping[str, Any] = SANA_1_6B,
    autoencoder: str | None = "dc-ae-f32c32-sana-1.0",
    steps: int = 20,
    resolution: int = 256,
) -> Case:
    """Return SANA-1.6B's drawing: guided steps over DC-AE latents, then the decoder; Gemma's embedding is given.

    Args:
        device: where.
        dtype: of everything.
        geometry: arguments of ``SanaTransformer2DModel``.
        autoencoder: a key of ``AUTOENCODERS``; None builds none.
        steps: of a picture.
        resolution: pixels a side.
    """
    model: Any = with_random_weights(lambda: SanaTransformer2DModel(**geometry), device, dtype)
    vae: Any = None if autoencoder is None else random_autoencoder(autoencoder, device, dtype)
    config = model.config
    side = resolution // 32
    latents = torch.randn(1, config.in_channels, side, side, device=device, dtype=dtype)
    caption = torch.randn(2, _SANA_PROMPT, config.caption_channels, device=device, dtype=dtype)
    seen = (torch.arange(_SANA_PROMPT, device=device)[None] < torch.tensor([[4], [40]], device=device)).to(dtype)

    def step(number: int) -> torch.Tensor:
        with torch.no_grad():
            times = torch.full((2,), 999.0 - number % steps, device=device)
            out = model(
                latents.repeat(2, 1, 1, 1), encoder_hidden_states=caption, encoder_attention_mask=seen, timestep=times
            ).sample
            unconditional, conditional = out.chunk(2)
            return unconditional + _SANA_GUIDANCE * (conditional - unconditional)

    def decode() -> torch.Tensor:
        with torch.no_grad():
            return vae.decode(latents).sample

    return Case(
        name="SANA-1.6B",
        what=f"diffusers' SanaTransformer2DModel as SanaPipeline calls it, guidance {_SANA_GUIDANCE:g}, caption of "
        f"{_SANA_PROMPT} positions; DC-AE decoder; Gemma-2-2B, which reads the prompt, is left out",
        resolution=resolution,
        tokens=side**2,
        steps=steps,
        passes=2,
        parameters=count(model),
        active_parameters=count(model),
        step_flops=2.0 * 2 * _sana_multiply_adds(model, side**2),
        weight_bytes=count(model) * dtype.itemsize,
        step=step,
        decode=None if vae is None else decode,
        blocks=list(model.transformer_blocks),
    )


def _sana_multiply_adds(model: Any, tokens: int) -> int:
    """Return the multiply-adds of one sequence."""
    config, blocks = model.config, model.transformer_blocks
    width = config.num_attention_heads * config.attention_head_dim
    each_token = matrix_numbers(model.proj_out) + model.patch_embed.proj.weight.numel()
    each_word = matrix_numbers(model.caption_projection)
    attention = 0
    for block in blocks:
        each_token += matrix_numbers(block.attn1, block.attn2.to_q, block.attn2.to_out)
        each_token += sum(part.weight.numel() for part in block.ff.modules() if isinstance(part, nn.Conv2d))
        each_word += matrix_numbers(block.attn2.to_k, block.attn2.to_v)
        # Linear attention: values (and a row of ones) times keys, and that times queries.
        attention += 2 * tokens * width * (config.attention_head_dim + 1)
        attention += 2 * tokens * _SANA_PROMPT * config.num_cross_attention_heads * config.cross_attention_head_dim
    return tokens * each_token + _SANA_PROMPT * each_word + matrix_numbers(model.time_embed) + attention


def _without_eyes(config: Any) -> Any:
    """Return the model less what only sees: drawing does without."""
    model = JanusForConditionalGeneration(config)
    for part in ("vision_model", "aligner"):
        delattr(model.model, part)
    del model.model.vqmodel.encoder
    return model
