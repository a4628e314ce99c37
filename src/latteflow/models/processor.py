"""Words and pictures to a Qwen2-VL backbone's inputs, without torchvision.

transformers' own ``Qwen2VLProcessor`` holds a video processor that needs torchvision. This one holds a tokenizer and
the Pillow image processor, puts as many image tokens in place of a picture as it has merged patches, and marks them in
``mm_token_type_ids``, from which the backbone numbers its multimodal rotary positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from latteflow.errors import UserError

IMAGE_TOKEN = "<|image_pad|>"
VISION_START_TOKEN = "<|vision_start|>"
VISION_END_TOKEN = "<|vision_end|>"
PICTURE = VISION_START_TOKEN + IMAGE_TOKEN + VISION_END_TOKEN
"""What stands for one picture in a prompt, before the image token is repeated."""


class LatteFlowProcessor(ProcessorMixin):
    """A tokenizer and an image processor, called together.

    Args:
        image_processor: a ``Qwen2VLImageProcessorPil``.
        tokenizer: with the tokens ``<|vision_start|>``, ``<|image_pad|>`` and ``<|vision_end|>``.
        chat_template: the backbone's chat template (Jinja); left out, the tokenizer's own.
    """

    image_processor: Any
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Image.Image] | None = None,
        *,
        padding_side: str = "left",
    ) -> BatchFeature:
        """Return the tensors that the backbone's ``forward`` and ``generate`` take.

        Args:
            text: prompts; ``PICTURE`` stands where a picture goes.
            images: the pictures of all prompts, in order of appearance.
            padding_side: where shorter prompts of a batch are padded.

        Raises:
            UserError: the prompts hold another number of pictures than were given.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        images = list(images or ())
        if sum(prompt.count(IMAGE_TOKEN) for prompt in prompts) != len(images):
            raise UserError(
                f"the prompts name another number of pictures ({IMAGE_TOKEN}) than the {len(images)} given: "
                "leave the token out of your words"
            )
        vision: dict[str, torch.Tensor] = {}
        if images:
            vision = dict(self.image_processor(images=images, return_tensors="pt"))
            merge = self.image_processor.merge_size**2
            counts = iter((vision["image_grid_thw"].prod(-1) // merge).tolist())
            prompts = [_expand(prompt, counts) for prompt in prompts]
        words = self.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side=padding_side, add_special_tokens=False
        )
        image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        return BatchFeature(
            {
                "input_ids": words["input_ids"],
                "attention_mask": words["attention_mask"],
                "mm_token_type_ids": (words["input_ids"] == image_token_id).long(),
                **vision,
            }
        )

    def chat_prompt(self, question: str, *, pictures: int = 0) -> str:
        """Return one user turn as the backbone's chat template writes it, ready for the assistant's answer."""
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            [{"role": "user", "content": content}],  # type: ignore[arg-type, list-item]
            chat_template=self.chat_template,  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=True,
        )


def _expand(prompt: str, counts: Any) -> str:
    """Repeat each image token of ``prompt`` as often as the next of ``counts`` says."""
    parts = prompt.split(IMAGE_TOKEN)
    return parts[0] + "".join(IMAGE_TOKEN * next(counts) + part for part in parts[1:])
