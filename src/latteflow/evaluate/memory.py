"""How much memory a model needs to draw and to be trained, by formula, from live parts or from the meta device.

Peaks are of tensors alone, in bytes; the process itself (interpreter, libraries, a GPU's context) comes on top. Sizes
below: N image tokens and T prompt tokens a sequence, L layers in K groups of M, D wide; A = query heads (H) times their
width (h), G = key/value heads times h, I inside the feed-forward. ``w`` is the bytes of a number in the weights' dtype.

Drawing, S sequences at once (two a picture with guidance). Peak = weights + context + the largest of the last three:

=============  ========================================================================================
weights        every weight and buffer of backbone, replica and autoencoder, each in its own dtype
context        keys and values of S prompts, 2 L G T w each, and once more while halves are joined
prefill        reading one prompt: the stream and three times I, T (2 D + 3 I) w; the scores of one next token, in
               float32 too; and a copy of the output matrix in the layout that oneDNN wants of bfloat16 on a CPU,
               vocabulary D w, which a GPU does without
step           S sequences of: the stream before, in and after a layer, and places, 4 N D w; angles, 8 N h; and the
               larger of the feed-forward, 3 N I w, and attention: N A w and 2 (T + N) G w as projected; scores,
               probabilities, those of the layer before and their sum, 16 H N (T + N), and the map in it, 4 H N N
               (float32); without maps, N A w in their place
decoder        the most that its activations hold at a time, found by running it on the meta device; a convolution
               also holds a copy of its input and output, in the layout that its library wants
=============  ========================================================================================

Training of the replica with float32 weights under bf16 autocast, AdamW, averaged weights (EMA), as ``train/loop.py``
does; B samples a step, all groups present. P trainable numbers. Peak = what stays + the larger of the last two:

=============  ========================================================================================
frozen         weights of backbone and autoencoder, in their dtype; what a data set keeps ahead is not counted
weights        4 P; with LoRA the frozen replica in its dtype as well
optimizer      8 P, AdamW's two averages
average        4 P, the EMA
context        of B prompts in float32 or the dtype of the frozen parts, and once more of one group's samples
forward        activations saved for B samples, each through M layers, and 2 bytes a number of the matrices, which
               autocast keeps
backward       gradients, 4 P, and AdamW's two temporaries of the largest weight
=============  ========================================================================================

Saved activations a sample and layer, in bytes (tests hold them to what autograd keeps): 50 N D of the stream, of which
the norms keep the most (20 N D with LoRA, where no norm and no matrix has a gradient of its own), 8 N I, 4 N A,
8 N h, 4 (T + N) A, maps 6 H N (T + N) and, for the gates' gradients, 4 H N N from the third layer on, and what query
and key norms or adapters add.

LoRA puts adapters of rank r beside the seven matrices of every layer of the replica; nothing else is trained.

Not counted: what allocators lose to fragments, libraries' own buffers beyond the convolutions', logs and previews.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latteflow.models.quantization import stored_bytes
from latteflow.models.transformer import LatteFlowTransformer

LORA_RANK = 16


@dataclass(frozen=True)
class InferenceMemory:
    """What drawing needs, term by term as this module's head defines them."""

    weight_bytes: int
    context_bytes: int
    prefill_bytes: int
    step_bytes: int
    decoder_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Weights and context, and the most demanding of what happens one after the other."""
        return self.weight_bytes + self.context_bytes + max(self.prefill_bytes, self.step_bytes, self.decoder_bytes)

    def as_dict(self) -> dict[str, int]:
        """Return plain JSON values, the peak first."""
        return {"peak_bytes": self.peak_bytes, **asdict(self)}


@dataclass(frozen=True)
class TrainingMemory:
    """What training the replica needs, term by term as this module's head defines them."""

    trainable_parameters: int
    frozen_bytes: int
    weight_bytes: int
    optimizer_bytes: int
    average_bytes: int
    context_bytes: int
    activation_sample_bytes: int
    """Saved for the backward pass, one sample."""
    activation_bytes: int
    autocast_bytes: int
    gradient_bytes: int
    update_bytes: int

    @property
    def peak_bytes(self) -> int:
        """What stays, and the larger of the end of the forward and the end of the backward pass."""
        stays = self.frozen_bytes + self.weight_bytes + self.optimizer_bytes + self.average_bytes + self.context_bytes
        return stays + max(self.activation_bytes + self.autocast_bytes, self.gradient_bytes + self.update_bytes)

    def as_dict(self) -> dict[str, int]:
        """Return plain JSON values, the peak first."""
        return {"peak_bytes": self.peak_bytes, **asdict(self)}


def inference_memory(
    backbone: Any,
    replica: LatteFlowTransformer,
    vae: Any,
    *,
    prompt_tokens: int,
    latent_side: int | None = None,
    images: int = 1,
    guided: bool = True,
) -> InferenceMemory:
    """Return what drawing needs.

    Args:
        backbone: the vision-language model, on any device; it is not run.
        replica: the experts, likewise.
        vae: an ``AutoencoderDC``, likewise.
        prompt_tokens: T.
        latent_side: side of the latents; left out, the replica's own.
        images: drawn at once.
        guided: whether guidance doubles the sequences.
    """
    config, text = replica.config, backbone.config.get_text_config()
    side = config.sample_size if latent_side is None else latent_side
    tokens, sequences = (side // config.patch_size) ** 2, images * (2 if guided else 1)
    width, wide = text.hidden_size, backbone.dtype.itemsize
    reading = prompt_tokens * (2 * width + 3 * text.intermediate_size) * wide
    return InferenceMemory(
        weight_bytes=sum(weight_bytes(part) for part in (backbone, replica, vae)),
        context_bytes=2 * sequences * prompt_tokens * context_token_bytes(replica, backbone.dtype),
        prefill_bytes=reading + text.vocab_size * (wide + 4) + text.vocab_size * width * wide,
        step_bytes=step_bytes(replica, tokens, prompt_tokens, sequences=sequences),
        decoder_bytes=decoder_bytes(vae, side, images=images),
    )


def training_memory(
    backbone: Any,
    replica: LatteFlowTransformer,
    vae: Any,
    *,
    prompt_tokens: int,
    batch_size: int,
    lora_rank: int | None = None,
) -> TrainingMemory:
    """Return what a training step needs.

    Args:
        backbone: the vision-language model, on any device; it is not run.
        replica: the experts, without adapters; likewise.
        vae: an ``AutoencoderDC``, likewise.
        prompt_tokens: T.
        batch_size: B, samples of one forward pass.
        lora_rank: r; left out, every weight of the replica is trained.
    """
    config = replica.config
    tokens = (config.sample_size // config.patch_size) ** 2
    if lora_rank is None:
        numbers = sum(p.numel() for p in replica.parameters())
        matrices = sum(p.numel() for p in replica.parameters() if p.ndim > 1)
        largest, beside = max(p.numel() for p in replica.parameters()), 0
    else:
        numbers = matrices = lora_parameters(replica, lora_rank)
        largest, beside = lora_rank * max(config.intermediate_size, config.hidden_size), weight_bytes(replica)
    sample = activation_bytes(replica, tokens, prompt_tokens, lora_rank=lora_rank)
    context = batch_size * prompt_tokens * context_token_bytes(replica, backbone.dtype)
    return TrainingMemory(
        trainable_parameters=numbers,
        frozen_bytes=weight_bytes(backbone) + weight_bytes(vae),
        weight_bytes=4 * numbers + beside,
        optimizer_bytes=8 * numbers,
        average_bytes=4 * numbers,
        context_bytes=context + context // config.num_groups,
        activation_sample_bytes=sample,
        activation_bytes=batch_size * sample,
        autocast_bytes=2 * matrices,
        gradient_bytes=4 * numbers,
        update_bytes=8 * largest,
    )


def weight_bytes(module: nn.Module) -> int:
    """Return what a module's weights and buffers hold; tied weights count once."""
    return sum(stored_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def context_token_bytes(replica: LatteFlowTransformer, dtype: torch.dtype) -> int:
    """Return what the keys and values of one prompt token hold, in all layers, in the backbone's ``dtype``."""
    config = replica.config
    return 2 * config.num_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def lora_parameters(replica: LatteFlowTransformer, rank: int) -> int:
    """Return the numbers in adapters of ``rank`` beside the seven matrices of every layer."""
    config = replica.config
    width, inside = config.hidden_size, config.intermediate_size
    heads, key_values = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sides = 2 * (width + heads) + 2 * (width + key_values) + 3 * (width + inside)
    return config.num_layers * rank * sides


def step_bytes(replica: LatteFlowTransformer, image_tokens: int, context_tokens: int, *, sequences: int) -> int:
    """Return the most that the activations of one network call hold at a time; formula in this module's head."""
    config, wide = replica.config, replica.dtype.itemsize
    heads, key_values = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    keys = image_tokens + context_tokens
    stream = image_tokens * (4 * config.hidden_size * wide + 8 * config.head_dim)
    feed_forward = 3 * image_tokens * config.intermediate_size * wide
    attention = (image_tokens * heads + 2 * keys * key_values) * wide
    if config.residual_attention != "none":
        attention += config.num_attention_heads * image_tokens * (16 * keys + 4 * image_tokens)
    else:
        attention += image_tokens * heads * wide
    return sequences * (stream + max(feed_forward, attention))


def activation_bytes(
    replica: LatteFlowTransformer, image_tokens: int, context_tokens: int, *, lora_rank: int | None = None
) -> int:
    """Return what one sample keeps for the backward pass under bf16 autocast; formula in this module's head.

    "logits" is counted as "probs": what it keeps depends on which attention kernel PyTorch picks.
    """
    config, full = replica.config, lora_rank is None
    head_count, width = config.num_attention_heads, config.hidden_size
    heads, key_values = head_count * config.head_dim, config.num_key_value_heads * config.head_dim
    keys = image_tokens + context_tokens
    layer = image_tokens * ((50 if full else 20) * width + 8 * config.intermediate_size + 4 * heads)
    carried = 0
    if config.residual_attention == "none":
        layer += 8 * image_tokens * config.head_dim + 4 * keys * key_values + 4 * head_count * image_tokens
    else:
        layer += 8 * image_tokens * config.head_dim + 4 * keys * heads + 6 * head_count * image_tokens * keys
        carried = max(replica.group_size - 2, 0) * 4 * head_count * image_tokens**2 if full else 0
    if config.qk_norm:
        layer += (6 if full else 4) * image_tokens * (heads + key_values)
    if lora_rank is not None:
        layer += 7 * 2 * image_tokens * lora_rank
    around = 12 * image_tokens * width if full else 0
    return replica.group_size * layer + carried + around


@torch.no_grad()
def decoder_bytes(vae: Any, latent_side: int, *, images: int = 1) -> int:
    """Return the most that decoding holds at a time beside the weights, by running it on the meta device."""
    shadow, latents = on_meta(vae, latent_side, images=images)
    with _LiveBytes() as live:
        shadow.decode(latents)
    return live.peak


def on_meta(vae: Any, latent_side: int, *, images: int = 1) -> tuple[Any, torch.Tensor]:
    """Return an autoencoder's twin on the meta device, in its dtype, and latents for it to decode."""
    with torch.device("meta"):
        shadow = type(vae).from_config(vae.config)
        latents = torch.zeros(images, vae.config.latent_channels, latent_side, latent_side, dtype=vae.dtype)
    nn.Module.to(shadow, vae.dtype)
    return shadow.eval(), latents


class _LiveBytes(TorchDispatchMode):
    """Follows every tensor that is made until it is let go; ``peak`` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in inputs:
            self._follow(tensor, 0)  # what was there before is not ours
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in outputs:
            self._follow(tensor, tensor.untyped_storage().nbytes())
        convolves = func.overloadpacket is torch.ops.aten.convolution
        workspace = sum(tensor.nbytes for tensor in (inputs[0], *outputs)) if convolves else 0
        self.peak = max(self.peak, self.now + workspace)
        return result

    def _follow(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
