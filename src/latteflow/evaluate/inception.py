"""The Inception network of 2015 that FID, sFID and the Inception score are defined with.

The graph, its names and its departures from later Inception networks (average pooling that leaves the border out, a
maximum in the last block, 1,008 classes, TensorFlow 1's way of enlarging) are those of the file that torch-fidelity
publishes as ``weights-inception-2015-12-05-6726825d.pth`` and pytorch-fid as ``pt_inception-2015-12-05-6726825d.pth``:
neither package is needed, nor torchvision.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from latteflow.data.shards import sha256_of
from latteflow.errors import UserError

PUBLISHED = "6726825d"
"""How the SHA-256 of the published weights begins."""
SIDE = 299
_SPATIAL_CHANNELS = 7
_COUNTER = "num_batches_tracked"  # of no use here, and not in all files

Kernel = int | tuple[int, int]
Step = tuple[int, Kernel] | tuple[int, Kernel, Kernel]
"""A width, and a kernel; of two, each gives as many channels, side by side."""
Chains = Mapping[str, Sequence[Step]]


class Convolution(nn.Module):
    """Convolution, batch norm with learnt statistics, ReLU.

    Args:
        channels: that come in.
        width: channels that go out.
        kernel: one side, or height and width.
        stride: in both directions.
        padded: keep the size (stride 1), rather than leave the border out.
    """

    def __init__(self, channels: int, width: int, kernel: Kernel, *, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        height, across = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, across // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels, width, (height, across), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (number, width, h, w) of (number, channels, h, w)."""
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions beside one another and a pooling, their channels put together.

    Args:
        channels: that come in.
        chains: each one's steps, by the name that its weights have.
        pooled: channels of the convolution after the pooling; 0 keeps all, without one.
        halving: the last steps and the pooling, a maximum, go by two and leave the border out.
        maximum: pool by maximum rather than by the mean of what is within the picture.
    """

    def __init__(
        self, channels: int, chains: Chains, *, pooled: int = 0, halving: bool = False, maximum: bool = False
    ) -> None:
        super().__init__()
        self.halving, self.maximum = halving, maximum
        self.chains: list[list[list[str]]] = []
        for chain, steps in chains.items():
            names, width = [], channels
            for number, (out, *kernels) in enumerate(steps, start=1):
                last = number == len(steps)
                label = chain if len(steps) == 1 else f"{chain}_{number}"
                sides = [label] if len(kernels) == 1 else [f"{label}{letter}" for letter in "ab"]
                for name, kernel in zip(sides, kernels, strict=True):
                    valid = halving and last
                    self.add_module(name, Convolution(width, out, kernel, stride=1 + valid, padded=not valid))
                names.append(sides)
                width = out
            self.chains.append(names)
        self.branch_pool = Convolution(channels, pooled, 1) if pooled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return all channels, (number, channels, h, w)."""
        outputs = []
        for names in self.chains:
            y = x
            for sides in names:
                y = torch.cat([self.get_submodule(name)(y) for name in sides], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        if self.halving:
            return functional.max_pool2d(x, 3, stride=2)
        if self.maximum:
            x = functional.max_pool2d(x, 3, stride=1, padding=1)
        else:
            x = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return x if self.branch_pool is None else self.branch_pool(x)


_OF_35: Chains = {
    "branch1x1": [(64, 1)],
    "branch5x5": [(48, 1), (64, 5)],
    "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
}
_TO_17: Chains = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
_TO_8: Chains = {
    "branch3x3": [(192, 1), (320, 3)],
    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
}
_OF_8: Chains = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), (384, (1, 3), (3, 1))],
    "branch3x3dbl": [(448, 1), (384, 3), (384, (1, 3), (3, 1))],
}


def _of_17(width: int) -> Chains:
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))],
    }


class Seen(NamedTuple):
    """What the network says of pictures.

    Attributes:
        pooled: "pool_3", what FID compares, (number, 2048).
        spatial: the first 7 channels of "mixed_6/conv", what sFID compares, (number, 17 * 17 * 7), channels last.
        logits: of 1,008 classes, without their biases, as the Inception score takes them.
    """

    pooled: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor


class InceptionV3(nn.Module):
    """The network; its weights are what ``load_inception`` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)
        self.Mixed_5b = Mixed(192, _OF_35, pooled=32)
        self.Mixed_5c = Mixed(256, _OF_35, pooled=64)
        self.Mixed_5d = Mixed(288, _OF_35, pooled=64)
        self.Mixed_6a = Mixed(288, _TO_17, halving=True)
        self.Mixed_6b = Mixed(768, _of_17(128), pooled=192)
        self.Mixed_6c = Mixed(768, _of_17(160), pooled=192)
        self.Mixed_6d = Mixed(768, _of_17(160), pooled=192)
        self.Mixed_6e = Mixed(768, _of_17(192), pooled=192)
        self.Mixed_7a = Mixed(768, _TO_8, halving=True)
        self.Mixed_7b = Mixed(1280, _OF_8, pooled=192)
        self.Mixed_7c = Mixed(2048, _OF_8, pooled=192, maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pictures: torch.Tensor) -> Seen:
        """Return what is said of pictures.

        Args:
            pictures: from 0 to 255, (number, 3, height, width), of any size.
        """
        x = (enlarged_as_tensorflow(pictures.to(self.fc.weight.dtype), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        # TensorFlow counts blocks from Mixed_5b, which is its "mixed": Mixed_6d is "mixed_6".
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :_SPATIAL_CHANNELS]
        x = self.Mixed_6e(self.Mixed_6d(x))
        pooled = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        return Seen(pooled, spatial.permute(0, 2, 3, 1).flatten(1), pooled @ self.fc.weight.T)


def enlarged_as_tensorflow(x: torch.Tensor, side: int) -> torch.Tensor:
    """Return (number, channels, side, side), interpolated linearly as TensorFlow 1 does.

    Output i lies at i * size / side: corners are neither aligned nor centred, and nothing is smoothed before a picture
    is made smaller. Coordinates are float32, as they are there.
    """
    for dim in (3, 2):
        size = x.shape[dim]
        place = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(size / side)
        low = place.long()
        high = (low + 1).clamp_max(size - 1)
        share = (place - low).to(x.dtype)
        if dim == 2:
            share = share[:, None]
        left, right = x.index_select(dim, low), x.index_select(dim, high)
        x = left + (right - left) * share
    return x


def load_inception(file: str | Path) -> tuple[InceptionV3, str]:
    """Return the network with the weights of a file, and the first 8 digits of the file's SHA-256.

    Args:
        file: a state dict as torch-fidelity and pytorch-fid publish it; it is loaded as weights only.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(
            f"no Inception weights at {file}: give torch-fidelity's weights-inception-2015-12-05-{PUBLISHED}.pth, or "
            f"pytorch-fid's pt_inception-2015-12-05-{PUBLISHED}.pth"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{file} holds no weights that can be read: give the file as it was published") from error
    network = InceptionV3()
    _check_names(file, state, network.state_dict())
    network.load_state_dict({**_counters(network), **state})
    return network.requires_grad_(False).eval(), sha256_of(file)[: len(PUBLISHED)]


def _check_names(file: Path, state: object, wanted: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} is no state dict: give the FID Inception's, as it was published")
    shapes, wanted_shapes = (
        {name: tuple(value.shape) for name, value in some.items() if not name.endswith(_COUNTER)}
        for some in (state, wanted)
    )
    differing = sorted(name for name in shapes.keys() | wanted_shapes if shapes.get(name) != wanted_shapes.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{file} is not the FID Inception: {len(differing)} names or shapes differ, such as {name} (here "
            f"{shapes.get(name, 'missing')}, there {wanted_shapes.get(name, 'unknown')}); give the file as published"
        )


def _counters(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if name.endswith(_COUNTER)}
