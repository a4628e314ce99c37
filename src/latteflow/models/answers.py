"""Questions about pictures, answered by the backbone alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

from latteflow.models.processor import LatteFlowProcessor


@torch.no_grad()
def greedy_answers(
    backbone: nn.Module,
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
    inputs = processor([prompt] * len(images), images).to(backbone.device)  # type: ignore[arg-type]
    inputs["pixel_values"] = inputs["pixel_values"].to(backbone.dtype)
    output = backbone.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    answers = output[:, inputs["input_ids"].shape[1] :]
    return [answer.strip() for answer in processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]
