"""Questions about pictures, answered by the backbone alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from latteflow.models.processor import LatteFlowProcessor


@torch.no_grad()
def greedy_answers(
    backbone: Any,
    processor: LatteFlowProcessor,
    images: Sequence[Image.Image],
    question: str,
    *,
    max_new_tokens: int,
) -> list[str]:
    """Return the backbone's greedy answer to one question about each picture, all in one batch.

    Args:
        backbone: a transformers vision-language model.
        processor: its processor.
        images: RGB pictures.
        question: in words, without the chat template.
        max_new_tokens: where a long answer is cut.
    """
    prompt = processor.chat_prompt(question, pictures=1)
    inputs = processor([prompt] * len(images), images).to(backbone.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(backbone.dtype)
    output = backbone.generate(**inputs, max_new_tokens=max_new_tokens, **generation_settings(backbone, processor, {}))
    answers = output[:, inputs["input_ids"].shape[1] :]
    return [answer.strip() for answer in processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def generation_settings(backbone: Any, processor: LatteFlowProcessor, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``generate``: greedy unless ``settings`` say otherwise, ending where the model ends."""
    config, tokenizer = backbone.generation_config, processor.tokenizer
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    greedy = (
        {} if settings.get("do_sample") else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    return {"eos_token_id": ends, "pad_token_id": pad, **greedy, **settings}
