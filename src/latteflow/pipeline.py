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
from diffusers import AutoencoderDC
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from transformers import PreTrainedModel

from latteflow.errors import UserError
from latteflow.flow.guidance import Guidance
from latteflow.flow.noise import initial_noise
from latteflow.flow.schedulers import model_output_of_velocity, schedule_times, set_schedule
from latteflow.models.answers import greedy_answers
from latteflow.models.autoencoder import decode_latents
from latteflow.models.compilation import compile_groups
from latteflow.models.context import Context, compute_context, concatenate
from latteflow.models.conversation import ConversationCache, on_white
from latteflow.models.guided import GuidedVelocity
from latteflow.models.lora import LoraMixin
from latteflow.models.processor import LatteFlowProcessor, Message
from latteflow.models.request import check_output, check_prompt, check_sampling, check_size
from latteflow.models.residency import disable_group_residency, enable_group_residency
from latteflow.models.stored import StoredPipeline
from latteflow.models.transformer import LatteFlowTransformer


class LatteFlowPipeline(LoraMixin, StoredPipeline):
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
        self._conversation: ConversationCache | None = None
        self._interrupt = False

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
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 40,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        context: Context | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput:
        """Draw pictures.

        Args:
            prompt: one or several descriptions; "" draws without one. Left out where ``context`` is given.
            negative_prompt: what to steer away from, one for all prompts or one each; left out, the empty prompt.
            height: in pixels, a multiple of ``spatial_factor``; left out, the model's own.
            width: like ``height``.
            num_inference_steps: network calls a picture (Heun makes 2 N - 1).
            guidance_scale: 1 is the plain conditional model; higher follows the prompt more closely.
            guidance_interval: first and last t that are guided; outside, a step costs half (arXiv 2404.07724).
            num_images_per_prompt: pictures a prompt, in a row.
            generator: picture i takes its noise from ``initial_seed() + i`` of a single one, or from one of a list.
            latents: normalised noise to start from, (pictures, channels, height / factor, width / factor).
            context: of as many prompts, in place of ``prompt``: what ``encode_prompt`` returns.
            output_type: "pil", "np" (float in [0, 1], channels last), "pt" (channels first) or "latent".
            return_dict: an ``ImagePipelineOutput``; if false, a tuple.
            callback_on_step_end: called as ``callback(pipe, step, timestep, tensors)`` after each network call; may
                return changed ``latents``, and stop the run by setting ``pipe._interrupt = True``.
            callback_on_step_end_tensor_inputs: what ``tensors`` holds.

        Raises:
            UserError: a size, step count, guidance scale, number or prompt that cannot be.
        """
        size: int = self.transformer.config.sample_size * self.vae.spatial_compression_ratio
        height, width = (size if side is None else side for side in (height, width))
        check_prompt(prompt, context)
        check_size(height, width, factor=self.spatial_factor)
        check_sampling(num_inference_steps, guidance_scale, guidance_interval, num_images_per_prompt)
        check_output(output_type, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        # The context: the backbone reads each prompt once.
        context = self._context_of(prompt, context)
        halves = self._both_halves(context, negative_prompt, num_images_per_prompt, guided=guidance_scale != 1.0)

        # The path from noise to data: one expert a step.
        x_t = self._initial_noise(context, num_images_per_prompt, height, width, generator, latents)
        set_schedule(self.scheduler, num_inference_steps, device=x_t.device)
        x_t = self._solve(x_t, halves, Guidance(guidance_scale, *guidance_interval), callback_on_step_end)

        images = x_t if output_type == "latent" else self.decode(x_t, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[return-value, arg-type]

    def _context_of(self, prompt: str | Sequence[str] | None, context: Context | None) -> Context:
        """Return the context of prompts, or the caller's own, where the pipeline computes."""
        if context is not None:
            return context.to(self._execution_device)
        return self.encode_prompt([prompt] if isinstance(prompt, str) else list(prompt or ()))

    def _both_halves(
        self,
        context: Context,
        negative_prompt: str | Sequence[str] | None,
        num_images_per_prompt: int,
        *,
        guided: bool,
    ) -> Context:
        """Return the context of every picture; with guidance, the unconditional (or negative) half stands first."""
        if guided:
            # Picture i of either half has to stand at i of that half, so repeating comes before joining.
            halves = (self._encode_negative(negative_prompt, context), context)
            return concatenate([half.repeat_interleave(num_images_per_prompt) for half in halves])
        return context.repeat_interleave(num_images_per_prompt)

    def _solve(
        self,
        x_t: torch.Tensor,
        context: Context,
        guidance: Guidance,
        callback: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None,
    ) -> torch.Tensor:
        """Go from noise to data on the scheduler's grid; stop early where a callback asks for it.

        ``context`` holds the unconditional half first, if there is guidance.
        """
        self._interrupt = False
        times = schedule_times(self.scheduler)
        velocity = GuidedVelocity(self.transformer, context, times, guidance)
        with self.progress_bar(total=len(times)) as progress:
            for step, (timestep, t) in enumerate(zip(self.scheduler.timesteps, times, strict=True)):
                if self.interrupt:
                    break
                v = velocity(x_t, t)
                x_t = self.scheduler.step(model_output_of_velocity(v), timestep, x_t, return_dict=False)[0]
                if callback is not None:
                    changed = callback(self, step, timestep, {"latents": x_t}) or {}
                    x_t = changed.get("latents", x_t)
                progress.update()
        return x_t

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Context:
        """Return the backbone's context of prompts, each as one user turn of its chat template. [D]"""
        texts = [self.processor.chat_prompt(prompt) for prompt in prompts]
        words = self.processor(texts, padding_side="right").to(self._execution_device)
        return compute_context(self.backbone, words["input_ids"], words["attention_mask"])

    def _encode_negative(self, negative_prompt: str | Sequence[str] | None, context: Context) -> Context:
        number = len(context)
        texts = [negative_prompt or ""] if negative_prompt is None or isinstance(negative_prompt, str) else None
        texts = list(negative_prompt) if texts is None else texts * number  # type: ignore[arg-type]
        if len(texts) != number:
            raise UserError(f"{len(texts)} negative prompts for {number} prompts: give one, or one each")
        if any(texts):
            return self.encode_prompt(texts)
        # The empty prompt's context is kept across calls, as long as the same backbone stands where it stood.
        key = (id(self.backbone), self.backbone.dtype, context.mask.device)
        if key not in self._unconditional:
            self._unconditional = {key: self.encode_prompt([""])}
        return self._unconditional[key].repeat_interleave(number)

    def _initial_noise(
        self,
        context: Context,
        num_images_per_prompt: int,
        height: int,
        width: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return where the paths start: noise, or the caller's own."""
        # The context stands where the pipeline computes: diffusers walks all parts to tell that, at every question.
        number, device = len(context) * num_images_per_prompt, context.mask.device
        factor = self.vae.spatial_compression_ratio
        shape = (self.transformer.config.latent_channels, height // factor, width // factor)
        if latents is not None:
            if tuple(latents.shape) != (number, *shape):
                raise UserError(f"latents have shape {tuple(latents.shape)}: this call needs {(number, *shape)}")
            return latents.to(device, torch.float32)
        return initial_noise(shape, number, generator).to(device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Return the pictures of normalised latents (number, channels, height / factor, width / factor)."""
        pictures = decode_latents(self.vae, self.transformer.config, latents.to(self.vae.dtype))
        return VaeImageProcessor().postprocess(pictures.float(), output_type=output_type)  # type: ignore[return-value]

    def compile(self, **settings: Any) -> None:
        """Compile the experts, one graph for all groups: the first picture of a size takes longer, the others less.

        Args:
            **settings: of ``torch.compile``.

        Raises:
            UserError: they are compiled already.
        """
        compile_groups(self.transformer, **settings)

    def enable_group_residency(
        self, folder: str | Path | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep one expert group on the compute device and fetch the next while it works: docs/memory.md.

        Args:
            folder: of the saved pipeline, to read a group's weights from; left out, they are kept in CPU memory.
            device: where to compute, and where all other parts are moved; left out, where the pipeline is.

        Raises:
            UserError: it is enabled already, or cannot be (see ``models/residency.py``).
        """
        device = self._execution_device if device is None else device
        enable_group_residency(self.transformer, folder, device)
        for part in (self.backbone, self.vae):
            part.to(device)  # type: ignore[arg-type]

    def disable_group_residency(self) -> None:
        """Put all expert groups on the compute device again."""
        disable_group_residency(self.transformer)

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
            self.backbone, self.processor, [on_white(image)], question, max_new_tokens=max_new_tokens
        )
        self.maybe_free_model_hooks()
        return answers[0]

    def chat(
        self,
        messages: Sequence[Message],
        *,
        modalities: Sequence[str] = ("text",),
        streamer: Any = None,
        max_new_tokens: int = 512,
        **settings: Any,
    ) -> dict[str, Any]:
        """Return the assistant's next turn in a conversation: words, or a picture where one is asked for.

        Append it to ``messages``, with what you say next, and call again: only what is new is read, the rest comes
        from the cache of the last call.

        Args:
            messages: turns as transformers writes them, ``{"role": "user", "content": [{"type": "text", "text":
                ...}, {"type": "image", "image": a PIL picture}]}``; a string will do for words alone.
            modalities: ``["text"]``, or ``["image"]`` to have the turn drawn.
            streamer: for words, a transformers streamer such as ``TextIteratorStreamer``.
            max_new_tokens: where a long answer is cut.
            **settings: for words, arguments of transformers' ``generate`` (greedy unless ``do_sample``); for a
                picture, arguments of a call of this pipeline, such as ``generator`` and ``guidance_scale``.

        Returns:
            A message of the assistant, its content a list of one part.

        Raises:
            UserError: a message is none, or the conversation does not end with a user's turn.
        """
        if not messages or messages[-1].get("role") != "user":
            raise UserError("a conversation has to end with a user's turn")
        if list(modalities) not in (["text"], ["image"]):
            raise UserError(f"modalities is ['text'] or ['image']: got {list(modalities)}")
        if self._conversation is None or self._conversation.backbone is not self.backbone:
            self._conversation = ConversationCache(self.backbone, self.processor)
        part: dict[str, Any]
        if modalities[0] == "image":
            image = self(context=self._conversation.context(messages), **settings).images[0]
            part = {"type": "image", "image": image}
        else:
            words = self._conversation.answer(messages, max_new_tokens=max_new_tokens, streamer=streamer, **settings)
            self.maybe_free_model_hooks()
            part = {"type": "text", "text": words}
        return {"role": "assistant", "content": [part]}
