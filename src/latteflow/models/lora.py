"""LoRA on the replica, through PEFT: which layers it goes to, and diffusers' pipeline methods for it.

The replica is a diffusers ``PeftAdapterMixin``, so ``add_adapter``, ``save_lora_adapter``, ``load_lora_adapter``,
``set_adapters``, ``fuse_lora`` and the rest come from there. PEFT itself comes with the extra ``train``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors import SafetensorError
from torch import nn

from latteflow.errors import UserError
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.nn.block import ReplicaLayer


def own_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all inside it with their names as saved files have them: adapters are looked through."""
    wrapped = getattr(module, "base_layer", None)  # where PEFT keeps what it wraps
    if isinstance(wrapped, nn.Module):
        yield from own_modules(wrapped, name)
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from own_modules(child, f"{name}.{child_name}" if name else child_name)


def lora_targets(transformer: LatteFlowTransformer, groups: Iterable[int] | None = None) -> list[str]:
    """Return the full names of the linear maps that adapters go to: those the backbone gave, of attention and MLP.

    Args:
        transformer: the replica, with or without adapters.
        groups: the experts to adapt, by index; left out, all.

    Raises:
        UserError: there is no such group, or none is given.
    """
    number_of_groups = transformer.config.num_groups
    chosen = sorted(set(range(number_of_groups) if groups is None else groups))
    if not chosen or not set(chosen) <= set(range(number_of_groups)):
        raise UserError(f"groups have to be among 0 to {number_of_groups - 1}: got {chosen}")
    return [
        name
        for group in chosen
        for number in transformer.layers_of(group)
        for part, branch in _branches(cast(ReplicaLayer, transformer.layers[number]))
        for name, module in own_modules(branch, f"layers.{number}.{part}")
        if isinstance(module, nn.Linear)
    ]


def _branches(layer: ReplicaLayer) -> tuple[tuple[str, nn.Module], ...]:
    return ("self_attn", layer.self_attn), ("mlp", layer.mlp)


def lora_config(
    transformer: LatteFlowTransformer,
    rank: int = 16,
    alpha: float | None = None,
    groups: Iterable[int] | None = None,
    **settings: Any,
) -> Any:
    """Return a ``peft.LoraConfig`` for the replica, to give to ``transformer.add_adapter``.

    Args:
        transformer: the replica.
        rank: of the adapters' matrices.
        alpha: their output is scaled by ``alpha / rank``; left out, by 1.
        groups: the experts to adapt, by index; left out, all.
        **settings: further fields of ``LoraConfig``, such as ``lora_dropout``.

    Raises:
        UserError: PEFT is not installed, or there is no such group.
    """
    _require_peft()
    from peft import LoraConfig

    settings = {"target_modules": lora_targets(transformer, groups), **settings}
    return LoraConfig(r=rank, lora_alpha=cast(int, rank if alpha is None else alpha), **settings)


class LoraMixin(LoraBaseMixin):
    """diffusers' LoRA methods of a pipeline, for one whose adapters all stand in ``transformer``.

    ``set_adapters``, ``get_active_adapters``, ``delete_adapters``, ``enable_lora``, ``disable_lora`` and
    ``unload_lora_weights`` are inherited. Files are safetensors; pickles are refused.
    """

    transformer: LatteFlowTransformer
    _lora_loadable_modules = ["transformer"]  # noqa: RUF012 (diffusers' own type)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load an adapter that ``save_lora_weights`` wrote.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, a hub id, or the weights themselves.
            adapter_name: what to call it; left out, ``default_0`` and so on.
            **kwargs: as of ``transformer.load_lora_adapter``, such as ``weight_name`` and ``revision``.

        Raises:
            UserError: PEFT is not installed, or there are no weights, in safetensors, of an adapter of the replica.
        """
        _require_peft()
        source, file = pretrained_model_name_or_path_or_dict, kwargs.get("weight_name")
        if file is not None and not file.endswith(".safetensors"):  # diffusers would take a pickle
            raise UserError(f"weight_name {file} does not do: latteflow loads safetensors only")
        before = set(getattr(self.transformer, "peft_config", {}))
        settings = {"low_cpu_mem_usage": True, **kwargs, "use_safetensors": True, "_pipeline": self}
        try:
            self.transformer.load_lora_adapter(source, prefix="transformer", adapter_name=adapter_name, **settings)
        except (OSError, SafetensorError) as error:
            raise UserError(f"no adapter, in safetensors, could be loaded from {source}: {error}") from error
        if not kwargs.get("hotswap") and set(getattr(self.transformer, "peft_config", {})) == before:
            raise UserError(
                "no name in it starts with 'transformer.': what transformer.save_lora_adapter wrote is loaded by "
                "transformer.load_lora_adapter(folder, prefix=None, use_safetensors=True)"
            )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, torch.Tensor],
        weight_name: str | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write an adapter, as diffusers' training scripts do.

        Args:
            save_directory: the folder.
            transformer_lora_layers: what ``peft.get_peft_model_state_dict(transformer)`` returns.
            weight_name: the file; left out, ``pytorch_lora_weights.safetensors``.
            transformer_lora_adapter_metadata: the adapter's configuration, ``transformer.peft_config[name].to_dict()``;
                left out, its scale is taken for 1 when it is loaded.

        Raises:
            UserError: there are no weights.
        """
        if not transformer_lora_layers:
            raise UserError("no weights to save: give get_peft_model_state_dict(transformer)")
        cls.write_lora_layers(
            state_dict=cls.pack_weights(transformer_lora_layers, "transformer"),
            save_directory=str(save_directory),
            is_main_process=True,
            weight_name=cast(str, weight_name),
            save_function=cast(Any, None),
            safe_serialization=True,
            lora_adapter_metadata=cls.pack_weights(transformer_lora_adapter_metadata or {}, "transformer"),
        )

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Add the active adapters to the weights they adapt: no cost a step. Arguments as in diffusers."""
        super().fuse_lora(components or ["transformer"], **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take the adapters out of the weights again. Arguments as in diffusers."""
        super().unfuse_lora(components or ["transformer"], **kwargs)


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise UserError('LoRA needs PEFT: pip install "latteflow[train]"')
