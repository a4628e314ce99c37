"""A network of a few features, and pictures for it."""

from __future__ import annotations

import torch

from latteflow.evaluate.feature_networks import FeatureNetwork, Features
from toys import seeded


class ToyNetwork(FeatureNetwork):
    """Mean colours of the halves of a picture, colours of its corner, and which of its colours is the strongest."""

    name, side, value_range, suffix = "Toy", 8, (0.0, 1.0), "Toy"

    def _features(self, pictures):
        x = pictures.double() / 255
        pooled = torch.cat([half.mean(dim=(2, 3)) for half in x.tensor_split(2, dim=3)], dim=1)
        return Features(pooled, x[:, :, 0, :2].flatten(1), (10 * x.mean(dim=(2, 3))).softmax(dim=1))


class PlainNetwork(ToyNetwork):
    """The same without spatial features and classes, under the names that papers use."""

    name, suffix = "Plain", ""

    def _features(self, pictures):
        return Features(super()._features(pictures).pooled, None, None)


def pictures(number, seed=0, size=(8, 8), brightness=1.0):
    """Noise, each channel of each picture at a level of its own."""
    generator = seeded(seed)
    level = torch.rand(number, 3, 1, 1, generator=generator)
    noise = torch.rand(number, 3, *size, generator=generator)
    return (brightness * 255 * (0.7 * level + 0.3 * noise)).to(torch.uint8)
