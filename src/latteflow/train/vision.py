"""The small backbone's vision tower, trained alone: it learns to give a teacher's features and scores.

[D] A vision transformer that starts from nothing learns a thousand concepts badly from eight thousand pictures. It
learns far better to agree with a convolutional teacher on pictures distorted and blended in ever new ways, of which
there is no end; and the teacher's opinion is worth having on pictures without a label too (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half
from transformers.vision_utils import get_vision_position_ids

from latteflow.data.captioned import CaptionedImages, Record
from latteflow.data.transforms import blend, distort, nudge, patches_of
from latteflow.errors import UserError
from latteflow.models.backbones.small_qwen2_vl import small_backbone, train_tokenizer
from latteflow.train.classifier import (
    KEYS,
    TOP_WIDTH,
    PictureClassifier,
    class_numbers,
    classes_of,
    hit_shares,
    load_classifier,
)
from latteflow.train.recipe import VisionSection
from latteflow.train.samples import Samples
from latteflow.train.stage import Stage

_WEIGHTS = "vision.safetensors"
_IGNORED = -100
_STYLE_WEIGHT = 2.0  # of styles, the teacher says nothing, and few pictures of a batch have one


def picture_tokens(visual: Any, patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Return what Qwen2-VL's vision tower makes of pictures of one size: (number, tokens, hidden size).

    transformers' own forward goes through its pictures one by one in each layer, because they may differ in size. Here
    a batch is one matrix: the same numbers, in two thirds of the time (docs/LOG.md).

    Args:
        visual: the tower, ``backbone.model.visual``.
        patches: (number * patches, values), as ``patches_of`` returns them.
        grid: int64 (number, 3), all rows alike.
    """
    number, length = len(grid), int(grid[0].prod())
    x = functional.linear(patches, visual.patch_embed.proj.weight.flatten(1)).view(number, length, -1)
    positions = get_vision_position_ids(grid[:1], visual.spatial_merge_size)
    cos, sin = (part[:, None] for part in visual.rotary_pos_emb(x, positions))
    for block in visual.blocks:
        attention = block.attn
        shape = (number, length, 3, attention.num_heads, attention.head_dim)
        query, key, value = attention.qkv(block.norm1(x)).view(shape).unbind(2)
        query, key = (
            (part.float() * cos + rotate_half(part.float()) * sin).to(value.dtype).transpose(1, 2)
            for part in (query, key)
        )
        # Plain products: on CPU the backward pass of the fused attention takes longer than these two together.
        weights = (query * attention.scaling) @ key.transpose(-1, -2)
        mixed = weights.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value.transpose(1, 2)
        x = x + attention.proj(mixed.transpose(1, 2).reshape(number, length, -1))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x).view(number, length // visual.spatial_merge_size**2, -1)


class Guess(NamedTuple):
    """What a tower's readers take a teacher to see in pictures."""

    cells: torch.Tensor
    """Its features there, (number, tokens, 1280)."""
    texture: torch.Tensor
    """Its early moments, (number, values): strokes and shading, which tell styles."""


class Readers(nn.Module):
    """What reads classes, and the teacher's features, from a picture's tokens in training; left behind at export.

    Args:
        hidden_size: of a token.
        classes: how many classes each head tells apart, by name.
        textures: how many early moments the teacher has, which are read with its features; 0 for no teacher.
    """

    reads_out = True

    def __init__(self, hidden_size: int, classes: Mapping[str, int], *, textures: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.heads = nn.ModuleDict({name: nn.Linear(hidden_size, number) for name, number in classes.items()})
        self.cells = nn.Linear(hidden_size, TOP_WIDTH) if textures else None
        self.texture = nn.Linear(hidden_size, textures) if textures else None

    def forward(self, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], Guess | None]:
        """Return each head's scores of the mean token, and what the teacher is guessed to see."""
        tokens = self.norm(tokens.float())
        mean = tokens.mean(dim=1)
        scores = {name: head(mean).float() for name, head in self.heads.items()}
        if self.cells is None or self.texture is None:
            return scores, None
        return scores, Guess(self.cells(tokens).float(), self.texture(mean).float())


class SupervisedVision(nn.Module):
    """A vision tower and its readers."""

    def __init__(self, visual: nn.Module, readers: Readers) -> None:
        super().__init__()
        self.visual, self.readers = visual, readers

    def forward(self, patches: torch.Tensor, grid: torch.Tensor) -> tuple[dict[str, torch.Tensor], Guess | None]:
        """Return the readers' scores and features of pictures of one size."""
        return self.readers(picture_tokens(self.visual, patches, grid))


def teaching_loss(
    teacher: PictureClassifier,
    pictures: torch.Tensor,
    scores: Mapping[str, torch.Tensor],
    guess: Guess | None,
    wanted: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of a tower's readers against a teacher and the labels, and its parts.

    The parts: squared error of the features, cell by cell, and of the early moments; divergence from the teacher's
    concepts, of the concept head and of the teacher's own last layer on the tower's features; cross entropy of what
    labels there are. Labels alone teach few styles that carry to other pictures (docs/LOG.md). [D]

    Args:
        teacher: frozen; its cells have to be as many as the tower's tokens.
        pictures: what the tower saw, float in [-1, 1].
        scores: the readers' scores.
        guess: what the readers take the teacher to see.
        wanted: class numbers of each of ``KEYS``, int64 (number,), -100 where there is no label.
    """
    with torch.no_grad():
        taught, target, texture = teacher.opinion(pictures)
    if guess is None or guess.cells.shape != target.shape:
        seen = "none" if guess is None else guess.cells.shape[1]
        raise UserError(
            f"the tower has {seen} tokens a picture, the teacher {target.shape[1]} cells: patch_size of the one and "
            "picture_size of the other have to agree"
        )
    opinion = taught.softmax(dim=1)
    read = teacher.concept_scores(guess.cells.mean(dim=1))
    parts = {
        "features": functional.mse_loss(guess.cells, target),
        "texture": functional.mse_loss(guess.texture, texture),
        "opinion": _divergence(scores["concept"], opinion) + _divergence(read, opinion),
    }
    for key, loss in label_losses(scores, wanted).items():
        parts[key] = _STYLE_WEIGHT * loss if key == "style" else 0.5 * loss
    return torch.stack(list(parts.values())).sum(), {f"loss/{key}": part.detach() for key, part in parts.items()}


def label_losses(scores: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the mean cross entropy of each key that has labels; where a label is -100, there is none."""
    return {
        key: functional.cross_entropy(scores[key], numbers, label_smoothing=0.1)
        for key, numbers in wanted.items()
        if (numbers != _IGNORED).any()
    }


def answerable(records: Sequence[Record], classes: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor]:
    """Return class numbers as ``class_numbers`` does, but no style (-100) of pictures in extra styles.

    Nobody asks for the extra styles by name, and some are hard to tell from the others: earlier editions of them.
    """
    numbers = class_numbers(records, classes)
    numbers["style"][torch.tensor([record.extra for record in records])] = _IGNORED
    return numbers


def told_apart(wanted: Mapping[str, torch.Tensor], whole: torch.Tensor, mild: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return labels of changed pictures: -100 where they are no longer one thing, or (style) no longer of a style."""
    return {key: numbers.where(mild if key == "style" else whole, _IGNORED) for key, numbers in wanted.items()}


def _divergence(scores: torch.Tensor, opinion: torch.Tensor) -> torch.Tensor:
    return functional.kl_div(scores.log_softmax(dim=1), opinion, reduction="batchmean")


def unlike_any(
    pictures: torch.Tensor, generator: torch.Generator, *, mild_share: float, blend_share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pictures of three kinds, which of them are still one thing, and which still show their style.

    Some are only moved, every pixel keeps its value; of the others, which are distorted, some have another laid over.

    Args:
        pictures: float in [-1, 1], (number, 3, height, width).
        generator: a CPU generator; all draws come from it.
        mild_share: share of pictures that are only moved.
        blend_share: share of the distorted ones that another picture is laid over.
    """
    mild = torch.rand(len(pictures), generator=generator) < mild_share
    distorted, _, own = blend(distort(pictures, generator), generator, blend_share)
    changed = torch.where(mild[:, None, None, None], nudge(pictures, generator), distorted)
    return changed, mild | (own == 1), mild


class VisionStage(Stage):
    """The tower of a small backbone: labelled pictures, and any others, seen as the teacher sees them."""

    def __init__(
        self, settings: VisionSection, images: CaptionedImages, heldout: CaptionedImages, others: CaptionedImages
    ) -> None:
        """Build an untrained tower.

        Args:
            settings: the recipe's section.
            images: labelled training pictures.
            heldout: pictures to measure on.
            others: further training pictures, of whose labels only the style is used.
        """
        self.settings, self.images, self.heldout, self.others = settings, images, heldout, others
        self.classes = classes_of(images.records)
        self.teacher = load_classifier(settings.teacher, what="teacher")
        self.teacher.forget_concepts(self.classes["concept"])
        self.visual = small_vision(settings)
        self.model: nn.Module = SupervisedVision(
            self.visual,
            Readers(
                settings.hidden_size,
                {key: len(values) for key, values in self.classes.items()},
                textures=len(self.teacher.low_mean),
            ),
        )
        self.wanted = answerable(images.records, self.classes)
        # What else there is tells styles from things: the few labelled pictures alone are learnt by heart.
        number = {style: i for i, style in enumerate(self.classes["style"])}
        self.other_styles = torch.tensor(
            [_IGNORED if record.extra else number.get(record.style, _IGNORED) for record in others.records]
        )
        self.number = len(images)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Move the teacher, and remember where batches go."""
        self.device = device
        self.teacher.to(device)

    def loss(self, model: nn.Module, samples: Samples, data: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the loss of the pictures, some of them replaced by others."""
        index, generator = samples.index, samples.generator
        pictures = self.images.batch(index)
        wanted = {key: numbers[index] for key, numbers in self.wanted.items()}
        strange = round(self.settings.others_share * len(index)) if len(self.others) else 0
        drawn = torch.randint(max(1, len(self.others)), (strange,), generator=generator)
        if strange:
            pictures[:strange] = self.others.batch(drawn)
            for key, numbers in wanted.items():
                numbers[:strange] = self.other_styles[drawn] if key == "style" else _IGNORED
        pictures, whole, mild = unlike_any(
            pictures, generator, mild_share=self.settings.mild_share, blend_share=self.settings.blend_share
        )
        wanted = told_apart(wanted, whole, mild)
        pictures = pictures.to(self.device)
        scores, guess = model(*patches_of(pictures, patch_size=self.settings.patch_size))
        wanted = {key: numbers.to(self.device) for key, numbers in wanted.items()}
        loss, figures = teaching_loss(self.teacher, pictures, scores, guess, wanted)
        return loss * samples.share, figures

    def validate(self) -> dict[str, float]:
        """Return shares of held-out pictures told right by the heads, and of as many training pictures."""
        seen = self.images.spread(len(self.heldout))
        return {
            **hit_shares(self._scores(self.heldout), class_numbers(self.heldout.records, self.classes)),
            "trained_concept": hit_shares(self._scores(seen), class_numbers(seen.records, self.classes))["concept"],
        }

    def _scores(self, images: CaptionedImages) -> dict[str, torch.Tensor]:
        parts = []
        for index in torch.arange(len(images)).split(128):
            pictures = images.batch(index).to(self.device)
            parts.append(self.model(*patches_of(pictures, patch_size=self.settings.patch_size))[0])
        return {key: torch.cat([part[key] for part in parts]).cpu() for key in KEYS}

    def preview(self) -> None:
        """Show nothing: the validation figures say it."""

    def export(self, folder: Path) -> None:
        """Write tower and readers as ``load_vision`` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, folder / _WEIGHTS)


def small_vision(settings: VisionSection) -> nn.Module:
    """Return an untrained tower, as ``small_backbone`` builds it into a backbone of these sizes."""
    backbone = small_backbone(
        train_tokenizer([], vocabulary=300),
        hidden_size=settings.hidden_size,
        intermediate_size=32,
        num_layers=1,
        num_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        vision_depth=settings.vision_depth,
        vision_width=settings.vision_width,
        vision_heads=settings.vision_heads,
        patch_size=settings.patch_size,
    )
    return backbone.model.visual  # type: ignore[return-value]


def load_vision(folder: str | Path, model: SupervisedVision) -> None:
    """Read a trained tower and its readers into ``model``.

    Raises:
        UserError: there is none, or it has other sizes or classes.
    """
    file = Path(folder) / _WEIGHTS
    if not file.is_file():
        raise UserError(f"no vision tower in {folder}: train one with `latteflow train recipes/emoji-64/vision.yaml`")
    state = load_file(file)
    if model.readers.cells is None:
        state = {name: x for name, x in state.items() if not name.startswith(("readers.cells.", "readers.texture."))}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[1].strip()
        raise UserError(f"the vision tower in {folder} does not fit this recipe ({reason})") from error
