"""``LatteFlowPipeline``: prompts to pictures, and questions about pictures to answers.

A diffusers pipeline: saving, loading, the hub, offloading, progress bars and callbacks come from there. What is its own
is the order of work: the prompt's context once, then one expert a step, then the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from transformers import PreTrainedModel

from latteflow.errors import UserError
from latteflow.flow.guidance import guide
from latteflow.flow.schedulers import model_output_of_velocity, schedule_times, set_schedule
from latteflow.models.answers import greedy_answers
from latteflow.models.autoencoder import decode_latents
from latteflow.models.context import Context, compute_context, concatenate
from latteflow.models.embedded import resolve_model
from latteflow.models.processor import LatteFlowProcessor
from latteflow.models.saved import require_configs, require_weights
from latteflow.models.transformer import LatteFlowTransformer

_MOST_STEPS = 1000
_MOST_TOKENS = 16_384
"""Tokens of one picture: a bound against a size that was meant otherwise, not against any real one."""


class LatteFlowPipeline(DiffusionPipeline):
    """One model that draws and answers.

    Usage:

        pipe = LatteFlowPipeline.from_pretrained("emoji-64")
        image = pipe("a slice of pizza, noto style", generator=torch.Generator().manual_seed(0)).images[0]
        answer = pipe.ask(image, "What is this?")

    Args:
        backbone: the frozen vision-language model.
        processor: words and pictures to the backbone's inputs.
        transformer: the replica and its experts.
        vae: the autoencoder.
        scheduler: any diffusers flow-matching scheduler.
    """

    model_cpu_offload_seq = "backbone->transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        backbone: PreTrainedModel,
        processor: LatteFlowProcessor,
        transformer: LatteFlowTransformer,
        vae: AutoencoderDC,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(
            backbone=backbone, processor=processor, transformer=transformer, vae=vae, scheduler=scheduler
        )
        backbone.requires_grad_(False)
        self._unconditional: dict[tuple[Any, ...], Context] = {}
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> LatteFlowPipeline:
        """Load an embedded model by name, a local folder, or a model of the hub.

        Args:
            pretrained_model_name_or_path: ``emoji-64``, a folder, or a hub id.
            **kwargs: as in diffusers. ``dtype`` is float32 unless given, whatever the file holds.

        Raises:
            UserError: a local folder lacks the configuration, or weights, of a part.
        """
        kwargs.setdefault("dtype", torch.float32)
        place = resolve_model(str(pretrained_model_name_or_path))
        require_configs(Path(place), given=kwargs)
        pipe = super().from_pretrained(place, **kwargs)
        if not {"backbone", "transformer", "vae", "device_map"} & set(kwargs):
            require_weights(Path(place), pipe.backbone, pipe.transformer, pipe.vae)
        return pipe

    @property
    def spatial_factor(self) -> int:
        """Pixels a side of one token: heights and widths are its multiples."""
        return self.vae.spatial_compression_ratio * self.transformer.config.patch_size

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to stop (by setting ``_interrupt``, as in diffusers)."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 40,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput:
        """Draw pictures.

        Args:
            prompt: one or several descriptions; "" draws without one.
            negative_prompt: what to steer away from, one for all prompts or one each; left out, the empty prompt.
            height: in pixels, a multiple of ``spatial_factor``; left out, what the model was trained on.
            width: like ``height``.
            num_inference_steps: network calls a picture (Heun makes 2 N - 1).
            guidance_scale: 1 is the plain conditional model; higher follows the prompt more closely.
            num_images_per_prompt: pictures a prompt; a prompt's pictures come in a row.
            generator: picture i takes its noise from ``initial_seed() + i`` of a single generator, which is left as
                it was, or from generator i of a list.
            latents: normalised noise to start from, (pictures, channels, height / factor, width / factor).
            output_type: "pil", "np" (float in [0, 1], channels last), "pt" (channels first) or "latent".
            return_dict: an ``ImagePipelineOutput``; if false, a tuple of the images alone.
            callback_on_step_end: called as ``callback(pipe, step, timestep, tensors)`` after each call of the network;
                may return changed ``latents``, and may stop the run by setting ``pipe._interrupt = True``.
            callback_on_step_end_tensor_inputs: what ``tensors`` holds; only "latents" is offered.

        Raises:
            UserError: a size, step count, guidance scale, number or prompt that cannot be.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        size: int = self.transformer.config.sample_size * self.vae.spatial_compression_ratio
        height, width = size if height is None else height, size if width is None else width
        self._check(prompts, height, width, num_inference_steps, guidance_scale, num_images_per_prompt, output_type)
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise UserError(f"callback_on_step_end_tensor_inputs can hold {list(self._callback_tensor_inputs)} only")
        self._interrupt = False

        # The context: the backbone reads each prompt once.
        context = self._context(prompts, negative_prompt, num_images_per_prompt, guided=guidance_scale != 1.0)

        # The path from noise to data: one expert a step.
        x_t = self._initial_noise(len(prompts) * num_images_per_prompt, height, width, generator, latents)
        set_schedule(self.scheduler, num_inference_steps, device=x_t.device)
        x_t = self._solve(x_t, context, guidance_scale, callback_on_step_end)

        # The decoder.
        images = x_t if output_type == "latent" else self.decode(x_t, output_type)
        self.maybe_free_model_hooks()
        output = ImagePipelineOutput(images=images)  # type: ignore[arg-type]
        return output if return_dict else output.to_tuple()  # type: ignore[return-value]

    def _context(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str] | None,
        num_images_per_prompt: int,
        *,
        guided: bool,
    ) -> Context:
        """Return the context of every picture; with guidance, the unconditional (or negative) half stands first."""
        context = self.encode_prompt(prompts)
        if guided:
            # Picture i of either half has to stand at i of that half, so repeating comes before joining.
            halves = (self._encode_negative(negative_prompt, len(prompts)), context)
            return concatenate([half.repeat_interleave(num_images_per_prompt) for half in halves])
        return context.repeat_interleave(num_images_per_prompt)

    def _solve(
        self,
        x_t: torch.Tensor,
        context: Context,
        guidance_scale: float,
        callback: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None,
    ) -> torch.Tensor:
        """Go from noise to data on the scheduler's grid; stop early where a callback asks for it."""
        times = schedule_times(self.scheduler)
        with self.progress_bar(total=len(times)) as progress:
            for step, (timestep, t) in enumerate(zip(self.scheduler.timesteps, times, strict=True)):
                if self.interrupt:
                    break
                v = self._velocity(x_t, t, context, guidance_scale)
                x_t = self.scheduler.step(model_output_of_velocity(v), timestep, x_t, return_dict=False)[0]
                if callback is not None:
                    changed = callback(self, step, timestep, {"latents": x_t}) or {}
                    x_t = changed.get("latents", x_t)
                progress.update()
        return x_t

    def _velocity(self, x_t: torch.Tensor, t: float, context: Context, guidance_scale: float) -> torch.Tensor:
        """Return the guided velocity; ``context`` holds the unconditional half first where there is guidance."""
        if guidance_scale == 1.0:
            return self._expert_velocity(x_t, t, context)
        v_unconditional, v_conditional = self._expert_velocity(torch.cat([x_t, x_t]), t, context).chunk(2)
        return guide(v_conditional, v_unconditional, guidance_scale)

    def _expert_velocity(self, x_t: torch.Tensor, t: float, context: Context) -> torch.Tensor:
        times = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        return self.transformer(x_t.to(self.transformer.dtype), times, context).to(x_t.dtype)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Context:
        """Return the backbone's context of prompts, each as one user turn of its chat template. [D]"""
        texts = [self.processor.chat_prompt(prompt) for prompt in prompts]
        words = self.processor(texts, padding_side="right").to(self._execution_device)
        return compute_context(self.backbone, words["input_ids"], words["attention_mask"])

    def _encode_negative(self, negative_prompt: str | Sequence[str] | None, number: int) -> Context:
        texts = [negative_prompt or ""] if negative_prompt is None or isinstance(negative_prompt, str) else None
        texts = list(negative_prompt) if texts is None else texts * number  # type: ignore[arg-type]
        if len(texts) != number:
            raise UserError(f"{len(texts)} negative prompts for {number} prompts: give one, or one each")
        if any(texts):
            return self.encode_prompt(texts)
        # The empty prompt's context is kept across calls, as long as the same backbone stands where it stood.
        key = (id(self.backbone), self.backbone.dtype, self._execution_device)
        if key not in self._unconditional:
            self._unconditional = {key: self.encode_prompt([""])}
        return self._unconditional[key].repeat_interleave(number)

    def _initial_noise(
        self,
        number: int,
        height: int,
        width: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return float32 noise, drawn on the CPU picture by picture: a picture does not depend on its batch."""
        factor = self.vae.spatial_compression_ratio
        shape = (self.transformer.config.latent_channels, height // factor, width // factor)
        if latents is not None:
            if tuple(latents.shape) != (number, *shape):
                raise UserError(f"latents have shape {tuple(latents.shape)}: this call needs {(number, *shape)}")
            return latents.to(self._execution_device, torch.float32)
        generators = _generator_per_picture(generator, number)
        noise = torch.stack([torch.randn(shape, generator=one, device=one.device).cpu() for one in generators])
        return noise.to(self._execution_device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Return the pictures of normalised latents (number, channels, height / factor, width / factor)."""
        pictures = decode_latents(self.vae, self.transformer.config, latents.to(self.vae.dtype))
        return VaeImageProcessor().postprocess(pictures.float(), output_type=output_type)  # type: ignore[return-value]

    @torch.no_grad()
    def ask(self, image: Image.Image, question: str, *, max_new_tokens: int = 64) -> str:
        """Answer a question about a picture, greedily: the backbone's own answer.

        Args:
            image: a PIL picture of any mode; transparent parts are seen on white.
            question: in words.
            max_new_tokens: where a long answer is cut.

        Raises:
            UserError: the question is empty.
        """
        if not question.strip():
            raise UserError("the question is empty: ask something, such as 'What is this?'")
        answers = greedy_answers(
            self.backbone, self.processor, [_on_white(image)], question, max_new_tokens=max_new_tokens
        )
        self.maybe_free_model_hooks()
        return answers[0]

    def _check(
        self,
        prompts: Sequence[str],
        height: int,
        width: int,
        steps: int,
        guidance_scale: float,
        num_images_per_prompt: int,
        output_type: str,
    ) -> None:
        factor = self.spatial_factor
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"prompt has to be a string or a list of them: got {prompts!r}")
        for name, side in (("height", height), ("width", width)):
            if side < factor or side % factor:
                raise UserError(f"{name} {side} does not do: give a multiple of {factor}")
        if height * width > _MOST_TOKENS * factor**2:
            raise UserError(f"{height}x{width} is more than {_MOST_TOKENS} tokens of {factor}x{factor}: draw smaller")
        if not 1 <= steps <= _MOST_STEPS:
            raise UserError(f"num_inference_steps has to be 1 to {_MOST_STEPS}: got {steps}")
        if not 0 <= guidance_scale <= 100:  # false for NaN, too
            raise UserError(f"guidance_scale has to be 0 to 100: got {guidance_scale}")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt has to be 1 or more: got {num_images_per_prompt}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type is pil, np, pt or latent: got {output_type!r}")


def _generator_per_picture(
    generator: torch.Generator | Sequence[torch.Generator] | None, number: int
) -> list[torch.Generator]:
    if isinstance(generator, torch.Generator) or generator is None:
        seed = int(torch.randint(2**62, ())) if generator is None else generator.initial_seed()
        return [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(number)]
    if len(generator) != number:
        raise UserError(f"{len(generator)} generators for {number} pictures: give one, or one each")
    return list(generator)


def _on_white(image: Image.Image) -> Image.Image:
    """Return the picture as RGB; what is transparent becomes white, as in the training set."""
    if image.mode == "P" or image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
