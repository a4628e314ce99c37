"""Where a replica's weights are while they are away: in a saved pipeline's files, or in CPU memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from latteflow.errors import UserError
from latteflow.models.embedded import resolve_model
from latteflow.models.lora import own_modules
from latteflow.models.quantization import is_quantized
from latteflow.models.saved import require_configs
from latteflow.models.transformer import LatteFlowTransformer

Files = Mapping[str, tuple[Path, list[int]]]
"""File and shape of every weight, by its name in the replica."""


def transformer_without_layers(folder: str | Path, dtype: torch.dtype = torch.float32) -> LatteFlowTransformer:
    """Load a saved pipeline's replica but for its layers, which have shape and dtype and no storage (meta tensors).

        pipe = LatteFlowPipeline.from_pretrained(folder, transformer=transformer_without_layers(folder))
        pipe.enable_group_residency(folder)

    Args:
        folder: of the saved pipeline, or an embedded model's name.
        dtype: of the weights.

    Raises:
        UserError: there is no such folder, or it lacks weights or their configuration.
    """
    files = weight_files(folder)
    place = Path(resolve_model(str(folder)))
    require_configs(place)
    config = LatteFlowTransformer.load_config(str(place), subfolder="transformer")
    with torch.device("meta"):
        replica = cast(LatteFlowTransformer, LatteFlowTransformer.from_config(cast(Any, config)))
    nn.Module.to(replica, dtype)
    for path, module in replica.io.named_modules(prefix="io"):
        for name, _ in list(module.named_parameters(recurse=False)):
            Weight.of(module, name, f"{path}.{name}", files).put_back(torch.device("cpu"))
    return replica.eval()


def transformer_of_group(
    folder: str | Path, group: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LatteFlowTransformer:
    """Load a saved pipeline's replica for one group alone: all other layers have no storage.

    Args:
        folder: of the saved pipeline, or an embedded model's name.
        group: which group's layers are loaded.
        dtype: of the weights.
        device: where they are put.

    Raises:
        UserError: as ``transformer_without_layers``.
    """
    replica = transformer_without_layers(folder, dtype)
    files, device = weight_files(folder), torch.device(device)
    for number in replica.layers_of(group):
        for path, module in own_modules(replica.layers[number], f"layers.{number}"):
            for name, _ in list(module.named_parameters(recurse=False)):
                Weight.of(module, name, f"{path}.{name}", files).put_back(device)
    replica.io.to(device)
    return replica


@dataclass
class Weight:
    """A parameter of the replica that can be away.

    Attributes:
        module: what it belongs to.
        name: its name there.
        key: its name in the replica.
        placeholder: what stands in its place while it is away: shape and dtype, no storage, no gradient.
        requires_grad: whether it was to be trained.
        file: where its values are; None for CPU memory.
        home: the values in CPU memory, once it has left; None where there is a file.
    """

    module: nn.Module
    name: str
    key: str
    placeholder: nn.Parameter
    requires_grad: bool
    file: Path | None
    home: torch.Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, name: str, key: str, files: Files | None) -> Weight:
        """Describe a parameter, to be kept in CPU memory where ``files`` is None.

        Raises:
            UserError: the files lack it or do not fit it, it was never loaded, or it is packed in a way of its own.
        """
        parameter = getattr(module, name)
        if type(parameter) is not nn.Parameter:
            raise UserError(f"{key} is a {type(parameter).__name__}: only plain weights, not quantised ones, can leave")
        if files is None and parameter.is_meta:
            raise UserError(f"{key} was not loaded: give the folder of the saved pipeline that holds it")
        file, shape = (None, None) if files is None else files.get(key, (None, None))
        if files is not None and shape != list(parameter.shape):
            found = "lack it" if shape is None else f"hold {shape}"
            raise UserError(
                f"{key} has shape {list(parameter.shape)} and the folder's files {found}: give its own folder"
            )
        placeholder = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        return cls(module, name, key, placeholder, parameter.requires_grad, file)

    def put(self, parameter: nn.Parameter) -> None:
        """Make ``parameter`` the one that the module computes with."""
        setattr(self.module, self.name, parameter)

    def leave(self, *, pinned: bool) -> None:
        """Free the parameter's memory; without a file, its values go to CPU memory first, page-locked if ``pinned``."""
        if self.file is None:
            home = getattr(self.module, self.name).detach().cpu()
            self.home = home.pin_memory() if pinned else home
        self.put(self.placeholder)

    def empty(self, device: torch.device) -> nn.Parameter:
        """Return a parameter on a device to ``read`` into: shape and dtype of the placeholder, any values."""
        with torch.inference_mode(False):  # it outlives the caller's mode, and is written to by another thread
            return nn.Parameter(torch.empty_like(self.placeholder, device=device), requires_grad=False)

    @torch.no_grad()
    def read(self, into: nn.Parameter) -> None:
        """Write the values into what ``empty`` returned, in its dtype.

        Raises:
            UserError: the file is gone or broken.
        """
        if self.file is None:
            into.copy_(cast(torch.Tensor, self.home), non_blocking=True)
            return
        try:
            # Opened anew for each weight: safetensors maps the file, and its pages count as memory while it is open.
            with safe_open(self.file, framework="pt") as tensors:
                into.copy_(tensors.get_tensor(self.key))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.key} cannot be read from {self.file}: {error}") from error

    def put_back(self, device: torch.device) -> None:
        """Make the parameter on a device what it was before it left, to be trained if it was."""
        parameter = self.empty(device)
        self.read(parameter)
        parameter.requires_grad = self.requires_grad
        self.put(parameter)


def weight_files(folder: str | Path) -> Files:
    """Return where a saved pipeline's replica is, from the files' headers; in one file or in shards.

    Args:
        folder: of the saved pipeline, or an embedded model's name.

    Raises:
        UserError: there are no weights, or quantised ones, two files hold the same, or one is broken.
    """
    place = Path(resolve_model(str(folder))) / "transformer"
    if is_quantized(place):
        raise UserError(f"{place} holds quantised weights: only plain ones can be read a group at a time")
    found: dict[str, tuple[Path, list[int]]] = {}
    for file in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    if key in found:
                        raise UserError(f"both {found[key][0]} and {file} hold {key}: move one of them away")
                    found[key] = file, tensors.get_slice(key).get_shape()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
    if not found:
        raise UserError(
            f"{place} holds no safetensors: give a folder that LatteFlowPipeline.save_pretrained wrote, or what "
            "LatteFlowPipeline.download returns for a hub id"
        )
    return found
