"""A toy backbone, tokenizer and processor of every family: transformers' own classes, sizes of milliseconds."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from latteflow.models.backbones import family_of
from latteflow.models.processor import LatteFlowProcessor
from toys import SENTENCES, seeded, shake

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl", "llava_onevision", "gemma3")
VARIANTS = (*MODEL_TYPES, "internvl/qwen3", "internvl/llama")
"""Model types, and after a slash the type of the text layers where a family has several."""
WINDOW = 64
"""Of Gemma3's sliding layers, in tokens."""
PIXELS = 32
"""Side of a tile."""
PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64], [32, 96], [96, 32], [128, 128]]
"""LLaVA-OneVision's resolutions; the last is more than it keeps at full size."""

_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 3e-6,  # nobody's default
}
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_VL = (*_QWEN, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_IDEFICS = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", *_ROWS)
_INTERN = (*_QWEN, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
_LLAVA = (*_QWEN, "<image>", "<video>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_GEMMA += ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
_SPECIAL = {"qwen2_vl": _QWEN_VL, "qwen2_5_vl": _QWEN_VL, "qwen3_vl": _QWEN_VL, "idefics3": _IDEFICS}
_SPECIAL |= {"smolvlm": _IDEFICS, "internvl": _INTERN, "llava_onevision": _LLAVA, "gemma3": _GEMMA}

_NAMED = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
}
"""Tokens that transformers' own processor asks its tokenizer for by name."""

_PARTS = "{% for part in m.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}"
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}PARTS{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEMPLATES = {
    "idefics3": "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}PARTS"
    "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "llava_onevision": "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}"
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}IMAGE{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ '\n' + part.text }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "gemma3": "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}PARTS{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
}
"""As the models' own; where there is none, the chat template of Qwen."""
_IMAGE = {
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "internvl": "<IMG_CONTEXT>\n",
    "llava_onevision": "<image>",
    "gemma3": "<start_of_image>",
}


def _template(model_type: str) -> str:
    template = _TEMPLATES.get("idefics3" if model_type == "smolvlm" else model_type, _CHATML)
    parts = _PARTS.replace("part.text", "part.text | trim") if model_type == "gemma3" else _PARTS
    image = _IMAGE.get(model_type, "<|vision_start|><|image_pad|><|vision_end|>")
    return template.replace("PARTS", parts).replace("IMAGE", "{{ " + repr(image) + " }}")


@cache
def toy_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the family's special tokens and a chat template of its kind."""
    special = _SPECIAL[model_type]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    ends = {"gemma3": "<eos>", "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=ends.get(model_type, "<|im_end|>"),
        bos_token="<bos>" if model_type == "gemma3" else None,
        extra_special_tokens=_NAMED.get(model_type, list(special)),
        chat_template=_template(model_type),
        clean_up_tokenization_spaces=False,
    )


def toy_image_processor(model_type: str) -> Any:
    """transformers' own on Pillow, at sizes where pictures are cut into a few tiles, as large ones are."""
    tile = {"height": PIXELS, "width": PIXELS}
    if model_type in ("idefics3", "smolvlm"):
        kind = SmolVLMImageProcessorPil if model_type == "smolvlm" else Idefics3ImageProcessorPil
        return kind(size={"longest_edge": 2 * PIXELS}, max_image_size={"longest_edge": PIXELS})
    if model_type == "internvl":
        return GotOcr2ImageProcessorPil(size=tile, min_patches=1, max_patches=4)
    if model_type == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(size=tile, image_grid_pinpoints=PINPOINTS)
    if model_type == "gemma3":
        return Gemma3ImageProcessorPil(size=tile)
    pixels = {"shortest_edge": PIXELS**2, "longest_edge": 4 * PIXELS**2}
    return Qwen2VLImageProcessorPil(size=pixels, patch_size=8, temporal_patch_size=2, merge_size=2)


def _qwen_config(model_type: str, text: dict[str, Any], ids: Any) -> Any:
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 8, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "rope_theta": 5e4, "mrope_section": [2, 2, 2]}
    wide = {**vision, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 40}
    if model_type == "qwen2_vl":
        kind, vision = transformers.Qwen2VLConfig, {**vision, "embed_dim": 32, "hidden_size": 48}
    elif model_type == "qwen2_5_vl":
        kind, vision = transformers.Qwen2_5_VLConfig, {**wide, "window_size": 32, "fullatt_block_indexes": [1]}
    else:
        kind = transformers.Qwen3VLConfig
        vision = {**wide, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        text, rope = {"head_dim": 16, **text}, {**rope, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return kind(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def toy_config(variant: str, **text: Any) -> Any:
    """The configuration of a toy backbone; ``text`` overrides that of its text layers."""
    model_type, _, text_type = variant.partition("/")
    tokenizer = toy_tokenizer(model_type)
    ids = tokenizer.convert_tokens_to_ids
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    rope = {"rope_type": "default", "rope_theta": 5e4}
    base = {**_TEXT, **ends, "vocab_size": len(tokenizer), "rope_parameters": rope}
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": PIXELS, "patch_size": 8}
    if model_type in ("idefics3", "smolvlm"):
        kind = transformers.SmolVLMConfig if model_type == "smolvlm" else transformers.Idefics3Config
        base = {"model_type": "llama", **base, **text}
        return kind(text_config=base, vision_config=vision, image_token_id=ids("<image>"), scale_factor=2,
                    pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    if model_type == "internvl":
        sides = {"image_size": [PIXELS, PIXELS], "patch_size": [8, 8]}
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e4}
        width = {"head_dim": 16} if text_type == "qwen3" else {}
        base = {"model_type": text_type or "qwen2", **base, "rope_parameters": rope, **width, **text}
        return transformers.InternVLConfig(text_config=base, vision_config={**vision, **sides},
                                           image_token_id=ids("<IMG_CONTEXT>"), image_seq_length=4)  # fmt: skip
    if model_type == "llava_onevision":
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        base = {"model_type": "qwen2", **base, **text}
        return transformers.LlavaOnevisionConfig(text_config=base, vision_config=vision,
                                                 image_token_index=ids("<image>"), video_token_index=ids("<video>"),
                                                 image_grid_pinpoints=PINPOINTS)  # fmt: skip
    if model_type == "gemma3":
        layers = ["sliding_attention", "full_attention"] * 2
        rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}  # fmt: skip
        own = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW, "layer_types": layers}
        base = {**base, **own, "rope_parameters": rope, **text}
        return transformers.Gemma3Config(
            text_config=base, vision_config=vision, mm_tokens_per_image=4, image_token_id=ids("<image_soft_token>"),
            boi_token_id=ids("<start_of_image>"), eoi_token_id=ids("<end_of_image>"),
        )  # fmt: skip
    return _qwen_config(model_type, {**base, **text}, ids)


def build(config: Any, seed: int = 0) -> Any:
    """A backbone of a configuration, every weight, bias and gate away from its start."""
    torch.manual_seed(seed)
    backbone = transformers.AutoModelForImageTextToText.from_config(config)
    shake(backbone, seeded(seed + 1), 0.05)
    return backbone.requires_grad_(False).eval()


def toy_family(variant: str) -> tuple[Any, LatteFlowProcessor]:
    """A backbone of a family, and its processor."""
    model_type = variant.partition("/")[0]
    backbone = build(toy_config(variant))
    processor = LatteFlowProcessor(
        toy_image_processor(model_type),
        toy_tokenizer(model_type),
        family=model_type,
        tokens_per_tile=family_of(backbone.config).tokens_per_tile(backbone.config),
    )
    return backbone, processor


@cache
def shared_family(variant: str) -> tuple[Any, LatteFlowProcessor]:
    """The same, built once; tests only read it."""
    return toy_family(variant)


def toy_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise: no two places are alike."""
    pixels = torch.randint(256, (height, width, 3), generator=seeded(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
