"""Stage three: the replica learns to draw; backbone and autoencoder are frozen, and their work is done ahead.

Latents and contexts depend on neither weights nor t: each picture's latent and a few captions' contexts are computed
once, and a step runs the replica alone.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from latteflow.data.grid import picture_grid
from latteflow.data.loader import generator_of
from latteflow.errors import UserError
from latteflow.flow.objective import FlowLoss, layerwise_flow_loss
from latteflow.flow.path import interpolate, target_velocity
from latteflow.flow.schedulers import make_scheduler
from latteflow.flow.timesteps import balanced_groups, timesteps_of, widened
from latteflow.models.autoencoder import AUTOENCODERS
from latteflow.models.context import Context
from latteflow.models.embedded import resolve_model
from latteflow.models.flops import step_flops
from latteflow.models.lora import lora_config
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.encode_parts import load_encoder, load_prompter
from latteflow.train.feeds import Feed
from latteflow.train.recipe import GeneratorSection, LoraSection
from latteflow.train.samples import Samples
from latteflow.train.stage import Stage

_PROMPT_TOKENS = 20
"""Assumed length of a prompt where operations are reckoned: a prompt is read by attention alone, a percent or two."""


class GeneratorStage(Stage):
    """The layerwise flow-matching loss on latents, the prompt dropped now and then for classifier-free guidance."""

    def __init__(self, settings: GeneratorSection, feed: Feed, *, size: int, seed: int) -> None:
        self.settings, self.feed, self.seed = settings, feed, seed
        self.number = feed.number
        for part in ("autoencoder", "backbone"):
            _require_there(part, getattr(settings, part))
        vae, vae_identity = load_encoder(settings.autoencoder)
        backbone, processor, backbone_identity = load_prompter(settings.backbone)
        feed.check(vae_identity, backbone_identity)
        mean, std = feed.statistics(vae)
        if settings.latent_scale == "common":
            std = [math.sqrt(sum(s * s for s in std) / len(std))] * len(std)
        replica = LatteFlowTransformer.from_backbone(
            backbone,
            num_groups=settings.num_groups,
            intervals=settings.edges,
            residual_attention=settings.residual_attention,
            shared_io=settings.shared_io,
            latent_channels=len(mean),
            sample_size=size // vae.spatial_compression_ratio,
            patch_size=settings.patch_size,
            time_embedding_size=settings.time_embedding_size,
            initial_scale=settings.initial_scale,
            pooled_context=settings.pooled_context,
            latents_mean=mean,
            latents_std=std,
            backbone_name=settings.backbone,
        )
        if settings.start_from is not None:
            _start_from(replica, settings.start_from)
        self.pipe = LatteFlowPipeline(backbone, processor, replica, vae, make_scheduler("euler"))
        self.pipe.set_progress_bar_config(disable=True)
        if settings.lora is not None:
            _adapt(replica, settings.lora, settings.groups)
        elif settings.groups is not None:
            _train_only(replica, settings.groups)
        self.model: nn.Module = replica
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Move the frozen parts to the device and compute there what training reads."""
        self.device = device
        self.pipe.backbone.to(device)
        self.pipe.vae.to(device)
        self.feed.prepare(self.pipe, device)

    def indices(self, step: int, batch_size: int, seed: int) -> torch.Tensor | None:
        """Return the samples that the feed puts together."""
        return self.feed.indices(step, batch_size, seed)

    def read(self, samples: Samples) -> Any:
        """Return what the feed reads from the disk."""
        return self.feed.read(samples)

    def chosen(self, batch_size: int, seed: int, step: int) -> torch.Tensor | None:
        """Return the places of the groups that are trained, where those are not all."""
        if self.settings.groups is None:
            return None
        groups = self._groups(batch_size, seed, step)
        return torch.isin(groups, torch.tensor(self.settings.groups)).nonzero()[:, 0]

    def loss(self, model: nn.Module, samples: Samples, data: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return what pictures add to the layerwise flow-matching loss, and each group's mean."""
        settings = self.settings
        x_1, context = self.feed.inputs(samples, data, settings.prompt_dropout)
        x_0 = samples.randn("noise", x_1.shape[1:]).to(self.device)
        groups, t = self._times(samples)
        found = self._flow_loss(model, x_0, x_1, groups.to(self.device), t.to(self.device), context)
        figures = {f"loss/group-{k}": part for k, part in enumerate(found.per_group) if int(found.counts[k])}
        if settings.shared_io:
            return found.total * samples.share, figures
        # No weight is shared: each group has its own loss, as it would by itself.
        every = torch.bincount(self._groups(samples.batch_size, samples.seed, samples.step))
        return (found.per_sample / every[groups].to(found.per_sample)).sum(), figures

    def _flow_loss(
        self,
        model: nn.Module,
        x_0: torch.Tensor,
        x_1: torch.Tensor,
        groups: torch.Tensor,
        t: torch.Tensor,
        context: Context,
    ) -> FlowLoss:
        v = model(interpolate(x_0, x_1, t), t, context, groups=groups)
        return layerwise_flow_loss(v.float(), target_velocity(x_0, x_1), groups, self.settings.num_groups)

    def _groups(self, batch_size: int, seed: int, step: int) -> torch.Tensor:
        """Return the group of every place of a step's batch: the same in every process."""
        generator = generator_of(seed, "groups", step)
        return balanced_groups(batch_size, self.settings.num_groups, generator=generator)

    def _times(self, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
        groups = self._groups(samples.batch_size, samples.seed, samples.step)[samples.places]
        t = self._times_in(groups, self._draws(samples))
        narrowing = self.settings.narrowing_steps
        if samples.step >= narrowing:
            return groups, t
        return groups, widened(t, groups, self.pipe.transformer.intervals, 1 - samples.step / narrowing)

    def _draws(self, samples: Samples) -> torch.Tensor:
        """Return what times are made of: two uniform numbers a sample, float64 (2, n)."""
        return torch.stack([samples.rand("time"), samples.rand("density")])

    def _times_in(self, groups: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        return timesteps_of(
            draws,
            groups,
            self.pipe.transformer.intervals,
            density=settings.density,
            mean=settings.logit_mean,
            std=settings.logit_std,
            uniform_mix=settings.uniform_mix,
        )

    def clipped_together(self) -> Sequence[tuple[str, Sequence[nn.Parameter]]]:
        """Return all parameters as one, or, where groups share none, each group's."""
        replica = self.pipe.transformer
        if self.settings.shared_io:
            return super().clipped_together()
        sets = []
        for group in range(self.settings.num_groups):
            modules = [*(replica.layers[i] for i in replica.layers_of(group)), replica.io[group]]
            parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
            if parameters:
                sets.append((f"group-{group}", parameters))
        return sets

    def describe(self, samples: Samples) -> dict[str, list[Any]]:
        """Return each sample's group and t."""
        groups, t = self._times(samples)
        return {"group": groups.tolist(), "t": t.tolist()}

    def flops_per_sample(self) -> float:
        """Return the operations of the replica's forward and backward pass on one sample, by formula."""
        config = self.pipe.transformer.config
        tokens = (config.sample_size // config.patch_size) ** 2
        passes = 4 if self.pipe.transformer.is_gradient_checkpointing else 3
        return passes * step_flops(self.pipe.transformer, tokens, _PROMPT_TOKENS)

    def validate(self) -> dict[str, float]:
        """Return the loss on held-out pictures with their canonical captions: same noise and times at every call."""
        total, number = 0.0, 0
        for part, (x_1, context) in enumerate(self.feed.validation()):
            generator = generator_of(self.seed, "validate", part)
            groups = balanced_groups(len(x_1), self.settings.num_groups, generator=generator)
            t = self._times_in(groups, torch.rand((2, len(x_1)), generator=generator, dtype=torch.float64))
            x_0 = torch.randn(x_1.shape, generator=generator).to(self.device)
            found = self._flow_loss(self.model, x_0, x_1, groups.to(self.device), t.to(self.device), context)
            total, number = total + found.total.item() * len(x_1), number + len(x_1)
        return {"loss": total / number} if number else {}

    def preview(self) -> Image.Image:
        """Return four pictures for each preview prompt, side by side, two prompts a row."""
        pictures: torch.Tensor = self.pipe(
            list(self.settings.preview_prompts),
            num_inference_steps=max(1, 20 // self.settings.num_groups) * self.settings.num_groups,
            guidance_scale=self.settings.guidance_scale,
            num_images_per_prompt=4,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images  # type: ignore[assignment]
        return picture_grid(pictures * 2 - 1, columns=8)

    def export(self, folder: Path) -> None:
        """Write the whole pipeline: backbone, processor, replica, autoencoder and scheduler; adapters apart as well."""
        replica = self.pipe.transformer
        if self.settings.lora is None:
            self.pipe.save_pretrained(folder)
            return
        fused = copy.deepcopy(replica)
        fused.fuse_lora()
        fused.unload_lora()
        LatteFlowPipeline(**{**self.pipe.components, "transformer": fused}).save_pretrained(folder)
        replica.save_lora_adapter(folder / "lora")


def _require_there(part: str, name: str) -> None:
    """Refuse a folder that is not there, before a library asks the hub for it."""
    if (
        Path(resolve_model(name)).is_dir()
        or name in AUTOENCODERS
        or re.fullmatch(r"(?!runs/)[\w-][\w.-]*/[\w.-]+", name)
    ):
        return
    raise UserError(
        f"no {part} in {name}: train one with `latteflow train recipes/emoji-64/{part}.yaml`, or give a folder, hub id "
        "or embedded model that is there"
    )


def _start_from(replica: LatteFlowTransformer, name: str) -> None:
    """Take over the weights of a trained replica of the same shape; latent statistics stay those of the new data."""
    folder = Path(resolve_model(name)) / "transformer"
    if not folder.is_dir():
        raise UserError(f"generator.start_from={name}: there is no trained pipeline in {folder.parent}")
    trained = LatteFlowTransformer.from_pretrained(folder, use_safetensors=True).state_dict()
    own = replica.state_dict()
    for key in sorted(set(own) ^ set(trained)) + [k for k in own if k in trained and own[k].shape != trained[k].shape]:
        raise UserError(f"generator.start_from={name} does not fit this recipe (weight {key!r})")
    replica.load_state_dict(trained)


def _adapt(replica: LatteFlowTransformer, lora: LoraSection, groups: Sequence[int] | None) -> None:
    """Freeze the replica and put trainable adapters beside it."""
    replica.requires_grad_(False)
    replica.add_adapter(lora_config(replica, lora.rank, lora.alpha, groups))


def _train_only(replica: LatteFlowTransformer, groups: Sequence[int]) -> None:
    """Leave every group's weights but these as they are."""
    replica.requires_grad_(False)
    for group in groups:
        for module in (*(replica.layers[i] for i in replica.layers_of(group)), replica.io[group]):
            module.requires_grad_(True)
