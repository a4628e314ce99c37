"""Stage two: a small vision-language model that captions, answers, and reads what stage three draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from latteflow.data import prompts
from latteflow.data.captioned import CaptionedImages, Record
from latteflow.data.loader import generator_of
from latteflow.data.transforms import augment, patches_of
from latteflow.models.answers import greedy_answers
from latteflow.models.backbones.small_qwen2_vl import small_backbone, small_processor, train_tokenizer
from latteflow.models.processor import IMAGE_TOKEN, PICTURE
from latteflow.train.recipe import BackboneSection

_IGNORED = -100  # transformers' label of positions that carry no loss


@dataclass(frozen=True)
class Conversation:
    """A training sequence: token ids, and which of them the model has to predict."""

    ids: list[int]
    labels: list[int]


class BackboneStage:
    """Next-token prediction on the answers of short conversations about pictures."""

    def __init__(self, settings: BackboneSection, images: CaptionedImages, heldout: CaptionedImages) -> None:
        self.settings, self.images, self.heldout = settings, images, heldout
        size = images.pixels.shape[-1]
        self.tokenizer = train_tokenizer(_corpus(images.records), vocabulary=settings.vocabulary)
        self.processor = small_processor(self.tokenizer, picture_size=size, patch_size=settings.patch_size)
        self.model: nn.Module = small_backbone(
            self.tokenizer,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            num_key_value_heads=settings.num_key_value_heads,
            vision_depth=settings.vision_depth,
            vision_width=settings.vision_width,
            vision_heads=settings.vision_heads,
            patch_size=settings.patch_size,
        )
        self.labels = sorted({record.label for record in images.records})
        self.picture_tokens = (size // settings.patch_size // 2) ** 2
        self.number = len(images)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Remember where batches go."""
        self.device = device

    def loss(
        self, model: nn.Module, index: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the mean cross entropy of the answers about pictures ``index``."""
        with_picture = torch.rand(len(index), generator=generator) >= self.settings.text_share
        with_picture[0] = True  # the vision tower takes part in every step
        conversations = [
            self._conversation(self.images.records[i], seen, generator)
            for i, seen in zip(index.tolist(), with_picture.tolist(), strict=True)
        ]
        pictures = self.images.batch(index[with_picture])
        if self.settings.augment:
            pictures = augment(pictures, generator)
        pixel_values, grid = patches_of(pictures.to(self.device), patch_size=self.settings.patch_size)
        ids, labels = (
            nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(self.device)
            for rows, value in (
                ([torch.tensor(c.ids) for c in conversations], int(self.tokenizer.pad_token_id)),  # type: ignore[arg-type]
                ([torch.tensor(c.labels) for c in conversations], _IGNORED),
            )
        )
        output = model(
            input_ids=ids,
            attention_mask=(ids != self.tokenizer.pad_token_id).long(),
            mm_token_type_ids=(ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).long(),
            pixel_values=pixel_values,
            image_grid_thw=grid,
            labels=labels,
        )
        return output.loss, {}

    def _conversation(self, record: Record, seen: bool, generator: torch.Generator) -> Conversation:
        """Return questions about a picture, or (unseen) a loose description to be said properly."""
        if seen:
            turns = prompts.draw_turns(record, self.settings.turns, self.labels, generator)
            head = PICTURE.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.picture_tokens)
        else:
            turns = [prompts.Turn(prompts.draw_caption(record, generator), prompts.canonical_caption(record))]
            head = ""
        return conversation_tokens(self.tokenizer, turns, head)

    def validate(self) -> dict[str, float]:
        """Return the share of 512 held-out pictures whose name, style and category are answered exactly."""
        part = self.heldout.spread(512)
        return {
            name: prompts.exact_share(self._answers(part, question), wanted)
            for name, question, wanted in (
                ("concept", prompts.WHAT, [record.label for record in part.records]),
                ("style", prompts.WHICH_STYLE, [record.style for record in part.records]),
                ("category", prompts.WHICH_CATEGORY, [record.group for record in part.records]),
            )
        }

    def _answers(self, images: CaptionedImages, question: str) -> list[str]:
        found = []
        for start in range(0, len(images), 128):
            pictures = images.pictures(range(start, min(start + 128, len(images))))
            found += greedy_answers(
                self.model, self.processor, pictures, question, max_new_tokens=prompts.ANSWER_TOKENS
            )
        return found

    def preview(self) -> None:
        """Show nothing: the validation figures say it."""

    def export(self, folder: Path) -> None:
        """Write the model and, beside it, the processor, as transformers and this project load them."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.processor.save_pretrained(folder)


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[prompts.Turn], head: str = ""
) -> Conversation:
    """Return the tokens of a conversation in the tokenizer's chat template, with labels on the answers alone.

    Args:
        tokenizer: with a chat template in which a user's turn comes with the assistant's opening token.
        turns: questions and answers.
        head: what stands before the first question, such as a picture's tokens.
    """
    ids: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(turns):
        question = (head if number == 0 else "") + turn.question
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        question_ids = tokenizer(str(asked), add_special_tokens=False).input_ids
        answer_ids = tokenizer(turn.answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        ids += question_ids + answer_ids
        labels += [_IGNORED] * len(question_ids) + answer_ids
    return Conversation(ids, labels)


def _corpus(records: Sequence[Record]) -> Iterator[str]:
    """Yield sentences of every kind about training pictures: what the tokenizer learns its merges from."""
    labels = sorted({record.label for record in records})
    generator = generator_of(0, "tokenizer")
    for record in records:
        yield prompts.draw_caption(record, generator)
        for turn in prompts.draw_turns(record, 5, labels, generator):
            yield turn.question
            yield turn.answer
