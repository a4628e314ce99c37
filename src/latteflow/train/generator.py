"""Stage three: the replica learns to draw; backbone and autoencoder are frozen, and their work is done ahead.

Latents and contexts depend on neither weights nor t: each picture's latent and a few captions' contexts are computed
once, and a step runs the replica alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from latteflow.data.captioned import CaptionedImages
from latteflow.data.grid import picture_grid
from latteflow.data.loader import generator_of
from latteflow.data.prompts import canonical_caption, draw_caption
from latteflow.errors import UserError
from latteflow.flow.objective import layerwise_flow_loss
from latteflow.flow.path import interpolate, target_velocity
from latteflow.flow.schedulers import make_scheduler
from latteflow.flow.timesteps import balanced_groups, sample_timesteps
from latteflow.models.autoencoder import encode_pictures
from latteflow.models.context import Context, concatenate
from latteflow.models.processor import LatteFlowProcessor
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.recipe import GeneratorSection

_PROMPTS_AT_ONCE = 256


class GeneratorStage:
    """The layerwise flow-matching loss on latents, the prompt dropped now and then for classifier-free guidance."""

    def __init__(
        self, settings: GeneratorSection, images: CaptionedImages, heldout: CaptionedImages, *, seed: int
    ) -> None:
        self.settings, self.images, self.heldout, self.seed = settings, images, heldout, seed
        self.number = len(images)
        self.vae = _load_autoencoder(settings.autoencoder)
        backbone, processor = _load_backbone(settings.backbone)
        mean, std = self._latent_statistics()
        replica = LatteFlowTransformer.from_backbone(
            backbone,
            num_groups=settings.num_groups,
            intervals=settings.edges,
            residual_attention=settings.residual_attention,
            shared_io=settings.shared_io,
            latent_channels=len(mean),
            sample_size=images.pixels.shape[-1] // self.vae.spatial_compression_ratio,
            patch_size=settings.patch_size,
            time_embedding_size=settings.time_embedding_size,
            initial_scale=settings.initial_scale,
            latents_mean=mean,
            latents_std=std,
        )
        self.pipe = LatteFlowPipeline(backbone, processor, replica, self.vae, make_scheduler("euler"))
        self.pipe.set_progress_bar_config(disable=True)
        self.model: nn.Module = replica
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Move the frozen parts to the device and compute there what training reads."""
        self.device = device
        self.pipe.backbone.to(device)
        self.vae.to(device)  # type: ignore[arg-type]
        self.latents = self._encode(self.images)
        self.contexts = self._training_contexts()
        self.heldout_latents = self._encode(self.heldout)
        self.heldout_contexts = self._contexts([canonical_caption(record) for record in self.heldout.records])

    def loss(
        self, model: nn.Module, index: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the layerwise flow-matching loss of pictures ``index``, and each group's part of it."""
        settings = self.settings
        caption = torch.randint(settings.captions_per_image, (len(index),), generator=generator)
        dropped = torch.rand(len(index), generator=generator) < settings.prompt_dropout
        # The empty prompt's context stands behind all others.
        which = torch.where(dropped, len(self.contexts) - 1, index * settings.captions_per_image + caption)
        context = self.contexts.select(which.to(self.device)).trim()
        return self._flow_loss(model, self.latents[index.to(self.device)], context, generator)

    def _flow_loss(
        self, model: nn.Module, x_1: torch.Tensor, context: Context, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings, replica = self.settings, self.pipe.transformer
        groups = balanced_groups(len(x_1), settings.num_groups, generator=generator)
        t = sample_timesteps(
            groups,
            replica.intervals,
            density=settings.density,
            mean=settings.logit_mean,
            std=settings.logit_std,
            uniform_mix=settings.uniform_mix,
            generator=generator,
        ).to(self.device)
        x_0 = torch.randn(x_1.shape, generator=generator).to(self.device)
        v = model(interpolate(x_0, x_1, t), t, context)
        loss = layerwise_flow_loss(v.float(), target_velocity(x_0, x_1), groups.to(self.device), settings.num_groups)
        figures = {f"loss/group-{k}": part for k, part in enumerate(loss.per_group.detach())}
        return loss.total, figures

    def validate(self) -> dict[str, float]:
        """Return the loss on held-out pictures with their canonical captions: same noise and times at every call."""
        total = 0.0
        parts = torch.arange(len(self.heldout)).split(256)
        for number, index in enumerate(parts):
            generator = generator_of(self.seed, "validate", number)
            context = self.heldout_contexts.select(index.to(self.device))
            loss, _ = self._flow_loss(self.model, self.heldout_latents[index.to(self.device)], context, generator)
            total += loss.item() * len(index)
        return {"loss": total / len(self.heldout)}

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
        """Write the whole pipeline: backbone, processor, replica, autoencoder and scheduler."""
        self.pipe.save_pretrained(folder)

    @torch.no_grad()
    def _latent_statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and spread a channel of the latents of (at most 2,048) training pictures."""
        index = torch.linspace(0, self.number - 1, min(2048, self.number)).long()
        latents = torch.cat([self.vae.encode(self.images.batch(part)).latent for part in index.split(256)])
        latents = latents * self.vae.config.scaling_factor
        return latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()

    @torch.no_grad()
    def _encode(self, images: CaptionedImages) -> torch.Tensor:
        parts = torch.arange(len(images)).split(256)
        config = self.pipe.transformer.config
        return torch.cat([encode_pictures(self.vae, config, images.batch(i).to(self.device)) for i in parts])

    def _training_contexts(self) -> Context:
        """Return the contexts of every picture's captions, in the pictures' order, and the empty prompt's last."""
        captions = [
            draw_caption(record, generator_of(self.seed, "caption", number, variant))
            for number, record in enumerate(self.images.records)
            for variant in range(self.settings.captions_per_image)
        ]
        return self._contexts([*captions, ""])

    def _contexts(self, captions: Sequence[str]) -> Context:
        """Return the contexts of captions in bfloat16: half the memory of what is read once a step."""
        found = [
            self.pipe.encode_prompt(captions[start : start + _PROMPTS_AT_ONCE]).to(torch.bfloat16)
            for start in range(0, len(captions), _PROMPTS_AT_ONCE)
        ]
        return concatenate(found)


def _load_autoencoder(folder: str) -> AutoencoderDC:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"no autoencoder in {folder}: train one with `latteflow train recipes/emoji-64/autoencoder.yaml`"
        )
    with _intact("autoencoder", folder):
        return AutoencoderDC.from_pretrained(folder).requires_grad_(False).eval()


def _load_backbone(folder: str) -> tuple[Qwen2VLForConditionalGeneration, LatteFlowProcessor]:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"no backbone in {folder}: train one with `latteflow train recipes/emoji-64/backbone.yaml`")
    with _intact("backbone", folder):
        backbone = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return backbone.requires_grad_(False).eval(), LatteFlowProcessor.from_pretrained(folder)


@contextmanager
def _intact(part: str, folder: str) -> Iterator[None]:
    """Name the part and its folder where its files cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{part} {folder} cannot be loaded ({reason}): train it anew") from error
