"""How a pipeline comes to be and is kept: from a backbone, from a folder or the hub, and back to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderDC, DiffusionPipeline
from transformers import PreTrainedModel

from latteflow.errors import UserError
from latteflow.flow.schedulers import make_scheduler
from latteflow.models.embedded import resolve_model
from latteflow.models.loading import load_autoencoder, load_backbone, load_processor
from latteflow.models.processor import LatteFlowProcessor
from latteflow.models.quantization import quantized_settings
from latteflow.models.saved import backbone_reference, refuse_code, require_configs, require_weights
from latteflow.models.transformer import LatteFlowTransformer

if TYPE_CHECKING:
    from typing_extensions import Self

_DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


class StoredPipeline(DiffusionPipeline):
    """The half of the pipeline that is about files; diffusers does the work."""

    backbone: Any
    transformer: Any
    vae: Any

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        vae: str | AutoencoderDC,
        *,
        num_groups: int = 4,
        size: int = 256,
        processor: LatteFlowProcessor | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        **settings: Any,
    ) -> Self:
        """Build a pipeline that is ready to be trained: the replica starts from the backbone's weights.

        Args:
            backbone: a folder or hub id of a model of a family in docs/backbones.md, or the model itself.
            vae: a folder or hub id of an ``AutoencoderDC``, or the model itself.
            num_groups: K, how many experts; divides the backbone's layers.
            size: pixels a side of the pictures it will draw unless asked otherwise.
            processor: the backbone's; left out, it is loaded from where the backbone is.
            revision: of the backbone, a branch, tag or commit of the hub.
            dtype: of everything that is loaded.
            device: where shards are loaded to, one after the other; left out, the CPU.
            **settings: further arguments of ``LatteFlowTransformer``, such as ``residual_attention``.

        Raises:
            UserError: the backbone's kind is not supported, or a folder is not safe or not complete.
        """
        name = backbone if isinstance(backbone, str) else backbone.config._name_or_path
        model = load_backbone(backbone, revision, dtype, device) if isinstance(backbone, str) else backbone
        autoencoder = load_autoencoder(vae, dtype, device) if isinstance(vae, str) else vae
        factor = autoencoder.spatial_compression_ratio
        if size < factor or size % factor:
            raise UserError(f"size {size} does not do: give a multiple of the autoencoder's factor {factor}")
        transformer = LatteFlowTransformer.from_backbone(
            model,
            num_groups=num_groups,
            **{
                "latent_channels": autoencoder.config.latent_channels,
                "sample_size": size // factor,
                "backbone_name": name or None,
                "backbone_revision": getattr(model.config, "_commit_hash", None) or revision,
                **settings,
            },
        )
        processor = processor or load_processor(name, model.config, revision)
        return cls(model, processor, transformer, autoencoder, make_scheduler("euler"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Self:
        """Load an embedded model by name, a local folder, or a model of the hub.

        Args:
            pretrained_model_name_or_path: ``emoji-64``, a folder, or a hub id.
            **kwargs: as in diffusers. ``dtype`` is float32 unless given, whatever the file holds; of quantised weights,
                it is theirs. A model saved without its backbone takes it from where its name says, unless ``backbone``
                is given. ``quantization_config``: see ``models/quantization.py``.

        Raises:
            UserError: a folder lacks the configuration, or weights, of a part, or holds code or pickles; or its
                weights are quantised, and torchao is missing or the arguments do not go with that.
        """
        refuse_code(kwargs)
        place = Path(resolve_model(str(pretrained_model_name_or_path)))
        if not place.is_dir():
            download = {name: kwargs[name] for name in _DOWNLOAD if name in kwargs}
            place = Path(cls.download(str(pretrained_model_name_or_path), **download))
        kwargs = {"dtype": torch.float32, **quantized_settings(place, kwargs)}
        elsewhere = backbone_reference(place)
        if elsewhere is not None and "backbone" not in kwargs:
            quantize = kwargs.get("quantization_config")
            config = quantize and quantize._resolve_quant_config(is_diffusers=False, module_name="backbone")
            kwargs["backbone"] = load_backbone(*elsewhere, kwargs["dtype"], quantization_config=config)
        require_configs(place, given=kwargs)
        pipe = super().from_pretrained(place, **kwargs)
        if not {"backbone", "transformer", "vae", "device_map"} & (set(kwargs) - {"backbone" if elsewhere else ""}):
            require_weights(place, None if elsewhere else pipe.backbone, pipe.transformer, pipe.vae)
        return pipe

    def save_pretrained(self, save_directory: str | Path, *, include_backbone: bool = True, **kwargs: Any) -> None:
        """Write the pipeline, as diffusers does: sharded safetensors, and a configuration a part.

        Unlike diffusers, the configurations do not tell from which folders of this machine the parts were loaded.

        Args:
            save_directory: the folder.
            include_backbone: if false, the frozen backbone is left out, and found again by its name and revision in
                the replica's configuration.
            **kwargs: as in diffusers, such as ``max_shard_size`` and ``push_to_hub``.

        Raises:
            UserError: the backbone is left out and has no name to be found by.
        """
        for part in (self, self.transformer, self.vae):
            place = Path(part.config.get("_name_or_path") or "")
            if place.is_absolute() or (place.name and place.is_dir()):
                part.register_to_config(_name_or_path=None)
        if include_backbone:
            return super().save_pretrained(save_directory, **kwargs)
        if not self.transformer.config.backbone_name:
            raise UserError(
                "the replica does not know its backbone's name, so it cannot be left out: "
                "build the pipeline with LatteFlowPipeline.from_backbone, or save it whole"
            )
        backbone = self.backbone
        self.register_modules(backbone=None)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.register_modules(backbone=backbone)
        return None
