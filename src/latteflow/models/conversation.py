"""Conversations with the backbone: what it has read is kept, so that a next turn reads only what is new."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from latteflow.errors import UserError
from latteflow.models.answers import generation_settings
from latteflow.models.backbones import family_of
from latteflow.models.context import Context, check_length, context_of_cache
from latteflow.models.processor import LatteFlowProcessor, Message, parts_of


@dataclass(frozen=True)
class _Prompt:
    """A conversation as the backbone reads it."""

    inputs: dict[str, torch.Tensor]
    """What the processor makes of it: ids and mask (1, T), and the pictures' inputs."""
    images: list[Image.Image]
    marks: list[tuple[int, bytes]]
    """Each token's id and, for a picture's tokens, the picture's digest: equal marks have equal keys and values."""
    starts: list[int]
    """Where each picture's tokens begin."""
    ends: list[int]


class ConversationCache:
    """The backbone's keys and values of the last conversation, reused as far as the next begins the same.

    Keeping them is the only state: every call is given the whole conversation and returns what a fresh one would.

    Args:
        backbone: a transformers vision-language model of a known family.
        processor: its processor.
    """

    def __init__(self, backbone: Any, processor: LatteFlowProcessor) -> None:
        self.backbone, self.processor = backbone, processor
        self.family, self.text = family_of(backbone.config), backbone.config.get_text_config()
        self._cache: DynamicCache | None = None
        self._marks: list[tuple[int, bytes]] = []

    @torch.no_grad()
    def context(self, messages: Sequence[Message]) -> Context:
        """Return the context of a conversation, ready for the assistant to draw.

        Raises:
            UserError: a message is none, or the conversation is longer than every layer sees.
        """
        prompt = self._prompt(messages)
        check_length(self.family, self.text, len(prompt.marks))
        positions, next_position = self._positions(prompt)
        cache = self._read(prompt, positions, len(prompt.marks))
        self._keep(cache, prompt.marks)
        return context_of_cache(cache, prompt.inputs["attention_mask"].bool(), next_position)

    @torch.no_grad()
    def answer(self, messages: Sequence[Message], *, max_new_tokens: int, streamer: Any = None, **settings: Any) -> str:
        """Return the backbone's next words.

        Args:
            messages: the conversation, a user's turn at its end.
            max_new_tokens: where a long answer is cut.
            streamer: a transformers streamer that is given the tokens as they come.
            **settings: of transformers' ``generate``, such as ``do_sample``; left out, greedy.

        Raises:
            UserError: a message is none.
        """
        prompt = self._prompt(messages)
        positions, _ = self._positions(prompt)
        # The last token is left to generate, which needs its logits.
        cache = self._read(prompt, positions, len(prompt.marks) - 1)
        tokens = self.backbone.generate(
            input_ids=prompt.inputs["input_ids"],
            attention_mask=prompt.inputs["attention_mask"],
            position_ids=positions,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **generation_settings(self.backbone, self.processor, settings),
        )[0].tolist()
        answer = tokens[len(prompt.marks) :]
        marks = prompt.marks + [(token, b"") for token in answer]
        self._keep(cache, marks[: cache.get_seq_length()])
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()  # type: ignore[union-attr]

    def _prompt(self, messages: Sequence[Message]) -> _Prompt:
        images = [_image_of(part) for message in messages for part in parts_of(message) if part["type"] == "image"]
        inputs, lengths = self.processor.prepare([self.processor.conversation(messages)], images)
        inputs = {name: value.to(self.backbone.device) for name, value in inputs.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.backbone.dtype)
        ids = inputs["input_ids"][0].tolist()
        marks, starts, ends = [(token, b"") for token in ids], [], []
        places = iter([i for i, token in enumerate(ids) if token == self.processor.image_token_id])
        for image, length in zip(images, lengths, strict=True):
            digest = _digest(image)
            own = [next(places) for _ in range(length)]
            for place in own:
                marks[place] = (ids[place], digest)
            starts.append(own[0])
            ends.append(own[-1])
        return _Prompt(inputs, images, marks, starts, ends)

    def _positions(self, prompt: _Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        rest = {k: v for k, v in prompt.inputs.items() if k not in ("input_ids", "attention_mask")}
        return self.family.positions(
            self.backbone, prompt.inputs["input_ids"], prompt.inputs["attention_mask"], rest if prompt.images else {}
        )

    def _read(self, prompt: _Prompt, positions: torch.Tensor, stop: int) -> DynamicCache:
        """Return a cache of the first ``stop`` tokens, of which only what is new is computed."""
        start = self._reusable(prompt, stop)
        cache, self._cache = self._cache, None  # not to be trusted if what follows fails
        if cache is None or start == 0:
            start, cache = 0, DynamicCache(config=self.text)
        elif cache.get_seq_length() > start:
            cache.crop(start - cache.get_seq_length())
        if start == stop:
            return cache
        new = [i for i, first in enumerate(prompt.starts) if first >= start]
        pictures = self._pictures(prompt, new)
        if self.family.token_types is not None and new:
            pictures[self.family.token_types] = prompt.inputs[self.family.token_types][:, start:stop]
        self.backbone(
            input_ids=prompt.inputs["input_ids"][:, start:stop],
            attention_mask=prompt.inputs["attention_mask"][:, :stop],
            position_ids=positions[..., start:stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **pictures,
        )
        return cache

    def _reusable(self, prompt: _Prompt, stop: int) -> int:
        """Return how many tokens at the front are in the cache, with no picture cut in two."""
        longest = self.family.longest_prompt(self.text)
        if self._cache is None or (longest is not None and len(self._marks) > longest):
            return 0  # a sliding layer has dropped its front and cannot be taken back
        same = 0
        for mine, theirs in zip(self._marks[:stop], prompt.marks[:stop], strict=False):
            if mine != theirs:
                break
            same += 1
        for first, last in zip(prompt.starts, prompt.ends, strict=True):
            if first < same <= last:
                same = first
        split = any(first < same for first in prompt.starts) and any(first >= same for first in prompt.starts)
        return 0 if split and not self.family.pictures_are_independent else same

    def _pictures(self, prompt: _Prompt, new: list[int]) -> dict[str, torch.Tensor]:
        """Return the model inputs of the pictures that are to be read now."""
        if not new:
            return {}
        known = ("input_ids", "attention_mask", self.family.token_types)
        if len(new) == len(prompt.images):
            return {name: value for name, value in prompt.inputs.items() if name not in known}
        vision, _ = self.family.pictures(
            self.processor.image_processor, [[prompt.images[i] for i in new]], self.processor.tokens_per_tile
        )
        vision = {name: value.to(self.backbone.device) for name, value in vision.items()}
        return {**vision, "pixel_values": vision["pixel_values"].to(self.backbone.dtype)}

    def _keep(self, cache: DynamicCache, marks: list[tuple[int, bytes]]) -> None:
        self._cache, self._marks = cache, marks


def _image_of(part: Any) -> Image.Image:
    image = part.get("image")
    if not isinstance(image, Image.Image):
        raise UserError(f"an image part holds a PIL picture under 'image': got {type(image).__name__}")
    return on_white(image)


def on_white(image: Image.Image) -> Image.Image:
    """Return the picture as RGB; what is transparent becomes white, as in the training set."""
    if image.mode == "P" or image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
