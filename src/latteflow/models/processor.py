"""Words and pictures to a backbone's inputs, for every family, without torchvision.

transformers' own processors of most families hold a video processor that needs torchvision. This one holds a tokenizer
and the Pillow image processor, and leaves to the family what stands in the prompt for a picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from latteflow.errors import UserError
from latteflow.models.backbones import family_named

IMAGE_TOKEN = "<|image_pad|>"
VISION_START_TOKEN = "<|vision_start|>"
VISION_END_TOKEN = "<|vision_end|>"
PICTURE = VISION_START_TOKEN + IMAGE_TOKEN + VISION_END_TOKEN
"""What stands for one picture in the embedded model's prompts, before the image token is repeated."""

_CUT = "\U0010ffff"  # a noncharacter: no text holds it
"""Stands inside what a user typed like a special token; prompts are tokenized in pieces between."""

Message = Mapping[str, Any]
"""A turn as transformers writes it: a role, and a content that is a string or a list of text and image parts."""


class LatteFlowProcessor(ProcessorMixin):
    """A tokenizer and an image processor, called together.

    Args:
        image_processor: the family's own, of transformers, on Pillow.
        tokenizer: the backbone's.
        chat_template: the backbone's chat template (Jinja); left out, the tokenizer's own.
        family: ``model_type`` of the backbone.
        tokens_per_tile: what the family's ``tokens_per_tile`` says of the backbone's config.
    """

    image_processor: Any
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        family: str = "qwen2_vl",
        tokens_per_tile: int = 0,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.family, self.tokens_per_tile = family, tokens_per_tile
        self._family = family_named(family)
        self._special = _special_tokens(tokenizer, (self._family.placeholder, self._family.image_token))

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Image.Image] | None = None,
        *,
        padding_side: str = "left",
    ) -> BatchFeature:
        """Return the tensors that the backbone's ``forward`` and ``generate`` take.

        Args:
            text: prompts as ``chat_prompt`` and ``conversation`` return them.
            images: the pictures of all prompts, in order of appearance.
            padding_side: where shorter prompts of a batch are padded.

        Raises:
            UserError: the prompts hold another number of pictures than were given.
        """
        inputs, _ = self.prepare([text] if isinstance(text, str) else list(text), images, padding_side=padding_side)
        return BatchFeature(inputs)

    def prepare(
        self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None, *, padding_side: str = "left"
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return what a call returns, and how many image tokens each picture takes."""
        images, placeholder = list(images or ()), self._family.placeholder
        counts = [prompt.count(placeholder) for prompt in prompts]
        if sum(counts) != len(images):
            raise UserError(
                f"the prompts name another number of pictures ({placeholder}) than the {len(images)} given: "
                "leave the token out of your words"
            )
        vision: dict[str, torch.Tensor] = {}
        words: list[str] = []
        if images:
            rest = iter(images)
            vision, words = self._family.pictures(
                self.image_processor, [[next(rest) for _ in range(count)] for count in counts], self.tokens_per_tile
            )
            expanded = iter(words)
            prompts = [_replaced(prompt, placeholder, expanded) for prompt in prompts]
        ids, mask = self._padded(self._token_ids(prompts), padding_side)
        kinds = {}
        if self._family.token_types is not None:
            kinds = {self._family.token_types: (ids == self.image_token_id).long()}
        lengths = [word.count(self._family.image_token) for word in words]
        return {"input_ids": ids, "attention_mask": mask, **kinds, **vision}, lengths

    @property
    def image_token_id(self) -> int:
        """Id of the token that a picture is made of."""
        return int(self.tokenizer.convert_tokens_to_ids(self._family.image_token))  # type: ignore[arg-type]

    def chat_prompt(self, question: str, *, pictures: int = 0) -> str:
        """Return one user turn as the backbone's chat template writes it, ready for the assistant's answer."""
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        return self.conversation([{"role": "user", "content": content}])

    def conversation(self, messages: Sequence[Message]) -> str:
        """Return turns as the backbone's chat template writes them, ready for the assistant's next.

        What looks like a special token in the words of a turn stays words.
        """
        rendered = [{"role": message["role"], "content": self._plain_parts(parts_of(message))} for message in messages]
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            rendered,  # type: ignore[arg-type]
            chat_template=self.chat_template,  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=True,
        )

    def _plain_parts(self, parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        plain: list[dict[str, Any]] = []
        for part, following in zip(parts, [*parts[1:], {}], strict=True):
            if part["type"] == "image":
                plain.append({"type": "image"})
                continue
            words, more = (each.get("text", "").replace(_CUT, "") for each in (part, following))
            count = [len(self._special.findall(text)) for text in (words + more, words, more)]
            cut = self._special.sub(lambda found: found[0] + _CUT, words)
            # A special token may begin in one part and end in the next.
            plain.append({"type": "text", "text": cut + _CUT if count[0] > count[1] + count[2] else cut})
        return plain

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        pieces = [prompt.split(_CUT) for prompt in prompts]
        flat = [piece for row in pieces for piece in row]
        ids = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        return [[token for _ in row for token in next(ids)] for row in pieces]  # type: ignore[union-attr]

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokenizer = self.tokenizer
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), int(padding))  # type: ignore[arg-type]
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(length - len(row), None) if side == "left" else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.int64), 1
        return ids, mask


def parts_of(message: Message) -> list[Mapping[str, Any]]:
    """Return a turn's content as a list of parts, whichever way it was written.

    Raises:
        UserError: a turn or a part that is none.
    """
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if message.get("role") not in ("system", "user", "assistant") or not isinstance(parts, Sequence):
        raise UserError(
            "a message needs a role (system, user or assistant) and a content (a string, or a list of parts such as "
            f"{{'type': 'text', 'text': ...}}): got {str(message)[:100]}"
        )
    for part in parts:
        known = isinstance(part, Mapping) and (
            part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))
        )
        if not known:
            raise UserError(f"a part of a message is a text or an image: got {str(part)[:100]}")
    return list(parts)


def _special_tokens(tokenizer: PreTrainedTokenizerBase, more: Sequence[str]) -> re.Pattern[str]:
    """Return what finds the first character of every special token, however they overlap."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | set(more)
    tokens |= set(tokenizer.all_special_tokens)
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    heads = (f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in longest_first)
    return re.compile("|".join(heads), re.DOTALL)


def _replaced(prompt: str, placeholder: str, words: Iterator[str]) -> str:
    """Put the next of ``words`` in place of every ``placeholder``."""
    first, *rest = prompt.split(placeholder)
    return first + "".join(next(words) + part for part in rest)
