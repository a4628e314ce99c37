"""The embedded model's backbone: transformers' Qwen2-VL at a hundredth of the size, with its own tokenizer.

[D] The chat template is Qwen2-VL's idea at three tokens a turn: the embedded model reads short sentences, and every
token is paid for in each layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latteflow.models.processor import IMAGE_TOKEN, VISION_END_TOKEN, VISION_START_TOKEN, LatteFlowProcessor

_PAD, _USER, _ASSISTANT, _END, _VIDEO = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|video_pad|>"
_SPECIAL = (_PAD, _USER, _ASSISTANT, _END, VISION_START_TOKEN, VISION_END_TOKEN, IMAGE_TOKEN, _VIDEO)

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most ``vocabulary`` tokens, learnt from ``texts``; case is folded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=[token for token in _SPECIAL if token not in (_PAD, _END)],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def small_processor(tokenizer: PreTrainedTokenizerFast, *, picture_size: int, patch_size: int) -> LatteFlowProcessor:
    """Return the processor: pictures are brought to about ``picture_size`` squared pixels, their shape kept."""
    pixels = picture_size**2
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": pixels, "longest_edge": pixels},
        patch_size=patch_size,
        temporal_patch_size=1,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LatteFlowProcessor(image_processor, tokenizer)


def small_backbone(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_key_value_heads: int,
    vision_depth: int,
    vision_width: int,
    vision_heads: int,
    patch_size: int,
) -> Qwen2VLForConditionalGeneration:
    """Return an untrained Qwen2-VL of the given size for ``tokenizer``'s vocabulary.

    The rotary sections keep Qwen2-VL's proportions (time 1/4, height 3/8, width 3/8 of half the head width).
    """
    half = hidden_size // num_heads // 2
    spatial = half * 3 // 8

    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]

    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [half - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision_depth,
            "embed_dim": vision_width,
            "hidden_size": hidden_size,
            "num_heads": vision_heads,
            "mlp_ratio": 4,
            "patch_size": patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "in_channels": 3,
        },
        image_token_id=token_id(IMAGE_TOKEN),
        video_token_id=token_id(_VIDEO),
        vision_start_token_id=token_id(VISION_START_TOKEN),
        vision_end_token_id=token_id(VISION_END_TOKEN),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)
