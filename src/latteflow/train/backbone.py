"""Stage two: a small vision-language model that captions, answers, and reads what stage three draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen2VLForConditionalGeneration

from latteflow.data import prompts
from latteflow.data.captioned import CaptionedImages, Record
from latteflow.data.loader import generator_of
from latteflow.data.transforms import augment, patches_of
from latteflow.models.answers import greedy_answers
from latteflow.models.backbones.small_qwen2_vl import small_backbone, small_processor, train_tokenizer
from latteflow.models.processor import IMAGE_TOKEN, PICTURE
from latteflow.train.classifier import classes_of, load_classifier
from latteflow.train.recipe import BackboneSection
from latteflow.train.samples import Samples
from latteflow.train.stage import Stage
from latteflow.train.vision import (
    Readers,
    SupervisedVision,
    answerable,
    label_losses,
    load_vision,
    picture_tokens,
    teaching_loss,
    told_apart,
    unlike_any,
)

_IGNORED = -100  # transformers' label of positions that carry no loss


@dataclass(frozen=True)
class Conversation:
    """A training sequence: token ids, and which of them the model has to predict."""

    ids: list[int]
    labels: list[int]


class SupervisedBackbone(nn.Module):
    """The backbone and, for training alone, what reads classes from its pictures' tokens.

    [D] Words alone teach a vision tower slowly: after 64,000 conversations one that starts from nothing told a mango
    from a chick by colour only (docs/LOG.md). The readers teach it directly, and a picture that is only classified
    costs a third of one that is talked about. They are left behind when the backbone is exported.

    Args:
        backbone: a Qwen2-VL.
        classes: how many classes each head tells apart, by name.
        textures: how many early moments a teacher has, which are read with its features; 0 for no teacher.
    """

    def __init__(
        self, backbone: Qwen2VLForConditionalGeneration, classes: Mapping[str, int], *, textures: int = 0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.readers = Readers(backbone.config.get_text_config().hidden_size, classes, textures=textures)

    def forward(
        self,
        pixel_values: torch.Tensor,
        grid: torch.Tensor,
        shown: torch.Tensor,
        ids: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """Return the cross entropy of the answers, and each reader's scores and features of every picture.

        Args:
            pixel_values: patches of B pictures of one size, (B * patches, values).
            grid: int64 (B, 3).
            shown: int64, which of the pictures the conversations show, in their order.
            ids: int64 (conversations, T), padded at the end; ``len(shown)`` of them show a picture.
            labels: like ``ids``, -100 where nothing is to be predicted.
        """
        backbone = self.backbone
        config = backbone.config
        tokens = picture_tokens(backbone.model.visual, pixel_values, grid)
        scores, guess = self.readers(tokens)

        is_picture, is_word = ids == config.image_token_id, ids != config.get_text_config().pad_token_id
        embeddings = backbone.get_input_embeddings()(ids)
        embeddings = embeddings.masked_scatter(is_picture[..., None], tokens[shown].to(embeddings.dtype))
        positions, _ = backbone.model.get_rope_index(
            ids,  # type: ignore[arg-type]
            mm_token_type_ids=is_picture.long(),  # type: ignore[arg-type]
            image_grid_thw=grid[shown],  # type: ignore[arg-type]
            attention_mask=is_word.long(),
        )
        hidden = backbone.model.language_model(
            inputs_embeds=embeddings, attention_mask=is_word.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        # The vocabulary's scores are needed only where a token of an answer comes next.
        predicts = labels[:, 1:] != _IGNORED
        answers = backbone.lm_head(hidden[:, :-1][predicts])
        return functional.cross_entropy(answers.float(), labels[:, 1:][predicts]), scores, guess


class BackboneStage(Stage):
    """Next-token prediction on the answers of short conversations; every picture is classified as well."""

    def __init__(self, settings: BackboneSection, images: CaptionedImages, heldout: CaptionedImages) -> None:
        self.settings, self.images, self.heldout = settings, images, heldout
        size = images.pixels.shape[-1]
        self.tokenizer = train_tokenizer(_corpus(images.records), vocabulary=settings.vocabulary)
        self.processor = small_processor(self.tokenizer, picture_size=size, patch_size=settings.patch_size)
        self.backbone = small_backbone(
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
        self.classes = classes_of(images.records)
        self.wanted = answerable(images.records, self.classes)
        numbers = {key: len(values) for key, values in self.classes.items()}
        self.teacher = load_classifier(settings.teacher, what="teacher") if settings.teacher else None
        if self.teacher is not None:
            self.teacher.forget_concepts(self.classes["concept"])
        textures = 0 if self.teacher is None else len(self.teacher.low_mean)
        model = SupervisedBackbone(self.backbone, numbers, textures=textures)
        if settings.vision:
            load_vision(settings.vision, SupervisedVision(self.backbone.model.visual, model.readers))
        self.model: nn.Module = model
        self.picture_tokens = (size // settings.patch_size // 2) ** 2
        self.number = len(images)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Move the teacher, if there is one, and remember where batches go."""
        self.device = device
        if self.teacher is not None:
            self.teacher.to(device)

    def loss(self, model: nn.Module, samples: Samples, data: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the cross entropy of answers about some of the pictures, and of all their classes."""
        settings, index, generator = self.settings, samples.index, samples.generator
        records = [self.images.records[i] for i in index.tolist()]
        number = max(1, round(settings.conversation_share * len(records)))
        seen = torch.rand(number, generator=generator) >= settings.text_share
        pictures, whole, mild = self._pictures(index, number, generator)
        talks = [
            self._conversation(record, sees, styled, generator)
            for record, sees, styled in zip(records[:number], seen.tolist(), mild[:number].tolist(), strict=True)
        ]
        pictures = pictures.to(self.device)
        pixel_values, grid = patches_of(pictures, patch_size=settings.patch_size)
        ids = _padded([talk.ids for talk in talks], int(self.tokenizer.pad_token_id))  # type: ignore[arg-type]
        labels = _padded([talk.labels for talk in talks], _IGNORED)
        shown = seen.nonzero()[:, 0]
        words, scores, guess = model(*(x.to(self.device) for x in (pixel_values, grid, shown, ids, labels)))
        wanted = told_apart({key: numbers[index] for key, numbers in self.wanted.items()}, whole, mild)
        wanted = {key: numbers.to(self.device) for key, numbers in wanted.items()}
        if self.teacher is not None:
            read, figures = teaching_loss(self.teacher, pictures, scores, guess, wanted)
        else:
            parts = label_losses(scores, wanted)
            read = torch.stack(list(parts.values())).sum()
            figures = {f"loss/{key}": part.detach() for key, part in parts.items()}
        return (words + settings.class_weight * read) * samples.share, {"loss/words": words.detach(), **figures}

    def _pictures(
        self, index: torch.Tensor, talked_about: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return pictures ``index`` as they are shown, which are one thing, and which show their style.

        Those talked about, the first, always are one thing.
        """
        pictures, every = self.images.batch(index), torch.ones(len(index), dtype=torch.bool)
        if not self.settings.augment:
            return pictures, every, every
        if self.teacher is None:
            return augment(pictures, generator), every, every
        share, blended = self.settings.mild_share, self.settings.blend_share
        parts = [
            unlike_any(part, generator, mild_share=share, blend_share=blend_share)
            for part, blend_share in ((pictures[:talked_about], 0.0), (pictures[talked_about:], blended))
            if len(part)
        ]
        pictures, whole, mild = (torch.cat(found) for found in zip(*parts, strict=True))
        return pictures, whole, mild

    def _conversation(self, record: Record, seen: bool, styled: bool, generator: torch.Generator) -> Conversation:
        """Return questions about a picture (of its style, if ``styled``), or (unseen) a description to be said well."""
        if seen:
            styled = styled and not record.extra
            turns = prompts.draw_turns(record, self.settings.turns, self.labels, generator, styled=styled)
            head = PICTURE.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.picture_tokens)
        else:
            turns = [prompts.Turn(prompts.draw_caption(record, generator), prompts.canonical_caption(record))]
            head = ""
        return conversation_tokens(self.tokenizer, turns, head)

    def validate(self) -> dict[str, float]:
        """Return the share of 512 held-out pictures whose name, style and category are answered exactly.

        And of as many training pictures the share that is named, to tell what is not learnt from what does not carry.
        """
        part, seen = self.heldout.spread(512), self.images.spread(512)
        shares = {
            name: prompts.exact_share(self._answers(part, question), wanted)
            for name, question, wanted in (
                ("concept", prompts.WHAT, [record.label for record in part.records]),
                ("style", prompts.WHICH_STYLE, [record.style for record in part.records]),
                ("category", prompts.WHICH_CATEGORY, [record.group for record in part.records]),
            )
        }
        named = prompts.exact_share(self._answers(seen, prompts.WHAT), [record.label for record in seen.records])
        return {**shares, "trained_concept": named}

    def _answers(self, images: CaptionedImages, question: str) -> list[str]:
        found = []
        for start in range(0, len(images), 128):
            pictures = images.pictures(range(start, min(start + 128, len(images))))
            found += greedy_answers(
                self.backbone, self.processor, pictures, question, max_new_tokens=prompts.ANSWER_TOKENS
            )
        return found

    def preview(self) -> None:
        """Show nothing: the validation figures say it."""

    def export(self, folder: Path) -> None:
        """Write the model and, beside it, the processor, as transformers and this project load them."""
        self.backbone.save_pretrained(folder)
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


def _padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """Return rows of tokens as one tensor, filled at the end with ``value``."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _corpus(records: Sequence[Record]) -> Iterator[str]:
    """Yield sentences of every kind about training pictures: what the tokenizer learns its merges from."""
    labels = sorted({record.label for record in records})
    generator = generator_of(0, "tokenizer")
    for record in records:
        yield prompts.draw_caption(record, generator)
        for turn in prompts.draw_turns(record, 5, labels, generator):
            yield turn.question
            yield turn.answer
