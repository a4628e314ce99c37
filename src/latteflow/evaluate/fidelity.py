"""How close two sets of pictures are: Fréchet distance and kernel distance of EfficientNet-Lite0's features.

Not FID and not KID, which mean Inception's features: the numbers cannot be compared with those of papers. A few hundred
pictures cannot fill 1,280 directions, so features are taken along the first principal directions of the real ones.
For thousands of pictures, and for FID itself: ``fidelity_report.py``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from latteflow.errors import UserError
from latteflow.evaluate.moments import distance_of_normals

DIRECTIONS = 64
"""Principal directions of the real features that are kept."""
FEATURE_SIDE = 128
"""Side in pixels that pictures are enlarged to before they are looked at."""


@torch.no_grad()
def picture_features(network: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Return mean features of the last layer, float64 (number, 1280).

    Args:
        network: EfficientNet-Lite0 with ImageNet's weights, ``convolutional_features(pretrained=True)``.
        pictures: uint8, (number, 3, height, width).
    """
    network.eval()
    found = []
    for some in pictures.split(64):
        size = (FEATURE_SIDE, FEATURE_SIDE)
        x = functional.interpolate(some.float() / 127.5 - 1, size=size, mode="bilinear", align_corners=False)
        found.append(network.extract_features(x).mean(dim=(2, 3)).double())  # type: ignore[operator]
    return torch.cat(found)


def principal_directions(features: torch.Tensor, number: int = DIRECTIONS) -> torch.Tensor:
    """Return the directions in which ``features`` (pictures, values) spread most, one a column, (values, number).

    Raises:
        UserError: there are no more pictures than directions.
    """
    if len(features) <= number:
        raise UserError(f"{number} directions need more pictures than that: got {len(features)}")
    centred = features - features.mean(dim=0)
    return torch.linalg.svd(centred, full_matrices=False).Vh[:number].T


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the squared Fréchet distance of the normal distributions fitted to two sets (pictures, values)."""
    return distance_of_normals(one.mean(dim=0), torch.cov(one.T), other.mean(dim=0), torch.cov(other.T))


def kernel_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the squared maximum mean discrepancy under the kernel (x y / values + 1)^3, without bias.

    It can come out below zero, where two sets are as close as two draws of one.
    """

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: torch.Tensor) -> torch.Tensor:
        products = kernel(x, x)
        return (products.sum() - products.trace()) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(one) + mean_of_pairs(other) - 2 * kernel(one, other).mean())


class Fidelity:
    """Distances to real pictures, all with the same features and directions.

    Args:
        network: EfficientNet-Lite0 with ImageNet's weights.
        real: uint8 pictures (number, 3, height, width): they give the directions, and ``number`` of them, spread
            evenly, are what others are compared with.
        number: pictures of each set that is compared.
    """

    def __init__(self, network: nn.Module, real: torch.Tensor, number: int) -> None:
        self.network, self.number = network, number
        features = picture_features(network, real)
        self.directions = principal_directions(features)
        spread = torch.linspace(0, len(real) - 1, min(number, len(real))).long()
        self.reference = features[spread] @ self.directions

    def of(self, pictures: torch.Tensor) -> dict[str, float]:
        """Return ``frechet`` and ``kernel`` distance of uint8 pictures, as many as the reference has.

        Raises:
            UserError: another number of pictures, whose distances could not be compared.
        """
        if len(pictures) != len(self.reference):
            raise UserError(f"distances depend on how many pictures are compared: {len(self.reference)} are wanted")
        found = picture_features(self.network, pictures) @ self.directions
        return {
            "frechet": frechet_distance(found, self.reference),
            "kernel": kernel_distance(found, self.reference),
        }
