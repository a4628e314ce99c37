"""Group residency: one group's layers on the compute device, the next group's fetched while it works.

Along a sampling path the groups are visited in order, each for a whole interval. So all but two groups' weights can
stay in CPU memory, or on disk, without a wait at every step: the group at work, and the one that is being fetched.

diffusers' ``apply_group_offloading`` with ``num_blocks_per_group`` = M cuts the layers in the same way, but moves at
every step: ``GroupOffloadingHook`` brings a group in before its first layer's forward and takes it out after its last
layer's. It knows no order beyond one forward, in which one group runs, so it cannot fetch the next; with
``offload_to_disk_path`` it first needs all weights in memory, to write them a second time; and it would take ``io``
out, whose parts are called without it, and never bring it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from latteflow.errors import UserError
from latteflow.models.lora import own_modules
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.models.weight_store import Weight, weight_files

_ATTRIBUTE = "_group_residency"
_Adapters = list[tuple[str, tuple[str, ...]]]


def enable_group_residency(
    transformer: LatteFlowTransformer, folder: str | Path | None = None, device: torch.device | str = "cpu"
) -> None:
    """Keep one group of layers on a device, and fetch the next while it works.

    Everything else of the replica (``io``, a hundredth of a 2B model's, [D] also where each group has its own) and
    adapters are moved to the device and stay. Adapters are loaded, or fused, before; fused ones are in no file.

    Args:
        transformer: the replica; with ``folder``, its layers may lack storage (see ``transformer_without_layers``).
        folder: of the saved pipeline that a group's weights are read from each time they are needed, in the place of
            those in memory, cast to the replica's dtype; an embedded model's name will do. Left out, they are kept in
            CPU memory, page-locked for a CUDA device.
        device: where the network runs.

    Raises:
        UserError: residency, or an offloading of diffusers, is enabled already; the folder lacks weights; there is
            nothing to gain, or no such device.
    """
    if getattr(transformer, _ATTRIBUTE, None) is not None:
        raise UserError("group residency is enabled already: call disable_group_residency() first")
    if any(map(_is_hooked, transformer.modules())):
        raise UserError("the replica is offloaded, or hooked, by diffusers already: load the pipeline anew")
    device = _existing(device)
    if folder is None and device.type == "cpu":
        raise UserError(
            "without a folder the weights are kept in CPU memory, and here they compute there: give the folder of the "
            "saved pipeline to read them from, or another device"
        )
    setattr(transformer, _ATTRIBUTE, GroupResidency(transformer, folder, device))


def disable_group_residency(transformer: LatteFlowTransformer) -> None:
    """Put all groups on the device that residency was enabled for, and end it; without residency, do nothing.

    Raises:
        UserError: weights cannot be read any more; residency then stays enabled.
    """
    residency = getattr(transformer, _ATTRIBUTE, None)
    if residency is not None:
        residency.end()
        delattr(transformer, _ATTRIBUTE)


class _Fetching(NamedTuple):
    group: int
    parameters: list[nn.Parameter]
    done: Future[None]


class GroupResidency:
    """The state of one replica's residency; ``enable_group_residency`` makes it and says what the arguments are.

    At most two groups' weights exist on the device at any time: the resident group, and one that is being fetched, by a
    thread that ends with its work. When group k becomes resident, fetching k + 1 begins. After the last group nothing
    is fetched [D]: the decoder comes next and needs the memory, and whether another picture follows is not known.
    A group that was not foreseen (a new picture, a batch of mixed times) is waited for.

    Attributes:
        resident: the group whose weights are in place; None before the first call.
    """

    def __init__(self, transformer: LatteFlowTransformer, folder: str | Path | None, device: torch.device) -> None:
        self.resident: int | None = None
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._fetching: _Fetching | None = None
        files = None if folder is None else weight_files(folder)
        groups = [transformer.layers_of(group) for group in range(transformer.config.num_groups)]
        self._layers = [[transformer.layers[number] for number in numbers] for numbers in groups]
        self._weights = [
            [
                Weight.of(module, name, f"{path}.{name}", files)
                for number in numbers
                for path, module in own_modules(transformer.layers[number], f"layers.{number}")
                for name, _ in module.named_parameters(recurse=False)
            ]
            for numbers in groups
        ]
        self._adapters = [_adapters(layers) for layers in self._layers]
        if files is not None and any(fused for adapters in self._adapters for _, fused in adapters):
            raise UserError("fused adapters are not in the folder's files: unfuse_lora(), or save the fused pipeline")
        weights = [weight for group in self._weights for weight in group]
        own = {id(getattr(weight.module, weight.name)) for weight in weights}
        others = [parameter for parameter in transformer.parameters() if id(parameter) not in own]
        if any(parameter.is_meta for parameter in others):
            raise UserError(
                "PEFT drops the weights of an adapter that layers without storage get: load all layers first"
            )

        for weight in weights:
            weight.leave(pinned=device.type == "cuda")
        for parameter in others:
            parameter.data = parameter.data.to(device)
        self._transformer = transformer
        transformer.enter_group = self.enter  # type: ignore[method-assign]
        self._refusal = transformer.register_state_dict_pre_hook(_refuse_state_dict)

    @torch.compiler.disable()
    def enter(self, group: int) -> None:
        """Make a group resident in place of the one that is, and begin to fetch the next.

        Raises:
            UserError: gradients are recorded, adapters were changed, or weights cannot be read.
        """
        if torch.is_grad_enabled():  # the graph would keep every group's weights
            raise UserError(
                "group residency is for drawing, not for gradients: call under torch.no_grad(), or "
                "disable_group_residency() to train"
            )
        if group == self.resident:
            return
        if _adapters(self._layers[group]) != self._adapters[group]:
            raise UserError(
                "adapters were loaded, removed or fused while group residency was enabled: disable it before, and "
                "enable it again after"
            )
        fetching = self._take(group) or self._begin(group)
        fetching.done.result()
        self._release()
        for weight, parameter in zip(self._weights[group], fetching.parameters, strict=True):
            weight.put(parameter)
        self.resident = group
        if group + 1 < len(self._weights):
            self._fetching = self._begin(group + 1)

    def end(self) -> None:
        """Put every group on the device, and leave the transformer alone."""
        self._take(None)
        self._release()
        for weight in (weight for group in self._weights for weight in group):
            weight.put_back(self._device)
        self._refusal.remove()
        del self._transformer.enter_group

    def _begin(self, group: int) -> _Fetching:
        # Memory is taken by the calling thread: malloc has an arena a thread, and would not use a freed group's again.
        parameters = [weight.empty(self._device) for weight in self._weights[group]]
        if self._stream is not None:  # that memory may be in use by what is queued
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        executor = ThreadPoolExecutor(1, thread_name_prefix="latteflow-residency")
        done = executor.submit(self._fetch, group, parameters)
        executor.shutdown(wait=False)  # takes no more work, so that the thread ends with this
        return _Fetching(group, parameters, done)

    def _fetch(self, group: int, parameters: Sequence[nn.Parameter]) -> None:
        with torch.cuda.stream(cast(Any, self._stream)):  # beside the computation's; of None, nothing
            for weight, parameter in zip(self._weights[group], parameters, strict=True):
                weight.read(parameter)
        if self._stream is not None:
            self._stream.synchronize()

    def _take(self, group: int | None) -> _Fetching | None:
        """Return what is being fetched if it is the group; otherwise wait for its end, and drop it."""
        fetching, self._fetching = self._fetching, None
        if fetching is None or fetching.group == group:
            return fetching
        wait([fetching.done])
        return None

    def _release(self) -> None:
        if self.resident is None:
            return
        if self._stream is not None:  # its memory is written to again as soon as it is free
            torch.cuda.current_stream(self._device).synchronize()
        for weight in self._weights[self.resident]:
            weight.put(weight.placeholder)
        self.resident = None


def _refuse_state_dict(*_: Any) -> None:
    raise UserError("group residency is enabled, so most weights are not in memory: disable_group_residency() first")


def _adapters(layers: Sequence[nn.Module]) -> _Adapters:
    """Return the names of all modules, with the adapters that are fused into them."""
    modules = (named for layer in layers for named in layer.named_modules())
    return [(name, tuple(getattr(module, "merged_adapters", ()))) for name, module in modules]


def _is_hooked(module: nn.Module) -> bool:
    """Say whether accelerate, or diffusers, has taken over the module's forward."""
    return hasattr(module, "_hf_hook") or bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))


def _existing(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter: torch built without CUDA
        raise UserError(f"there is no device {str(device)!r} here: {error}") from error
