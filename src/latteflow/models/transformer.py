"""LaTtE-Flow's generator: the replica of a backbone's layers, cut into groups, each the expert of a timestep interval.

Notable:

- exactly one group of M = L / K layers runs for a given t;
- latents attend to the frozen backbone layer's own keys and values of the prompt, and to one another;
- inside a group, attention maps are carried from layer to layer through a gate that depends on t;
- K = 1 is the paper's baseline, "Vanilla", of the same classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import distributed, nn

from latteflow.errors import UserError
from latteflow.flow.intervals import Intervals
from latteflow.models.backbones import family_of
from latteflow.models.context import Context
from latteflow.models.sampling_cache import Moment, SamplingCache, Surroundings
from latteflow.nn.block import ReplicaLayer
from latteflow.nn.embeddings import PatchEmbedding, TimeEmbedding, unpatchify
from latteflow.nn.feed_forward import Activation
from latteflow.nn.norm import RMSNorm, modulate
from latteflow.nn.residual_attention import ResidualAttention
from latteflow.nn.rotary import axes_of_frequencies, grid_positions, raster_positions, rotary_cos_sin


class LatentIO(nn.Module):
    """Latents in, velocity out, and the time embedding: what stands around a group's layers."""

    def __init__(self, channels: int, patch_size: int, hidden_size: int, time_size: int, norm_eps: float) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(channels, patch_size, hidden_size)
        self.time_embedding = TimeEmbedding(time_size)
        self.out_norm = RMSNorm(hidden_size, norm_eps)
        self.out_modulation = nn.Linear(time_size, 2 * hidden_size)
        self.head = nn.Linear(hidden_size, channels * patch_size**2)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Set the start of what has no counterpart in the backbone. All are [D]: the paper gives no values."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        nn.init.ones_(self.out_norm.weight)
        # The grid's places are told by rotary positions from the start; a learned place is added from nothing.
        nn.init.zeros_(self.patch_embedding.place.weight)
        # No dependence on t, and velocity zero: the best constant guess for normalised latents.
        for layer in (self.out_modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def modulation_of(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map the time embedding (B, time_size) to shift and scale in front of the head, each (B, 1, D)."""
        shift, scale = self.out_modulation(nn.functional.silu(time))[:, None].chunk(2, dim=-1)
        return shift, scale

    def velocity(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Map the last stream (B, N, D) to a velocity a patch, (B, N, channels · patch_size²)."""
        return self.head(modulate(self.out_norm(x), shift, scale))


class LatteFlowTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The replica and its experts.

    Usage:

        transformer = LatteFlowTransformer.from_backbone(backbone, num_groups=4, latent_channels=32)
        context = compute_context(backbone, input_ids, attention_mask)     # once a prompt
        velocity = transformer(x_t, t, context)                            # once a step

    Args:
        num_layers: L, layers of the backbone and of the replica.
        num_groups: K; divides L.
        intervals: the K + 1 edges of the timestep intervals; left out, uniform.
        residual_attention: "probs", "logits" or "none".
        shared_io: one patch embedding, time embedding and head for all groups (the default, [D]), or one a group.
        hidden_size: width, the backbone's.
        intermediate_size: width inside the feed-forward, the backbone's.
        num_attention_heads: the backbone's.
        num_key_value_heads: the backbone's.
        head_dim: the backbone's.
        attention_bias: whether queries, keys and values have a bias, as in the backbone.
        qk_norm: whether every head's queries and keys are normalised, as in the backbone.
        activation: "silu" or "gelu_tanh", the backbone's.
        norm_eps: the backbone's.
        rope_theta: the backbone's.
        rope_factor: the backbone's linear stretch of positions.
        mrope_section: the backbone's split of rotary frequencies over time, height and width; empty where words have
            one position, and latents then stand one after the other, in raster order. [D]
        mrope_interleaved: whether the sections take the frequencies in turns.
        local_layers: numbers of the layers with ``local_rope_theta`` and no stretch (Gemma3's sliding ones).
        local_rope_theta: their base.
        latent_channels: channels of the autoencoder's latents.
        sample_size: side of the latents the model was trained on; what a call without a size draws.
        patch_size: side, in latents, of what becomes one token.
        time_embedding_size: width of the time embedding.
        initial_scale: scale(t) of both branches of a layer at the start. [D]
        pooled_context: width inside a perceptron a layer that adds the words' mean value to every token; None for the
            paper's attention as the only path from words to latents. [D]
        latents_mean: mean a channel of the latents; empty stands for 0.
        latents_std: spread a channel of the latents; empty stands for 1.
        backbone_name: folder or hub id of the backbone, so that a model saved without it finds it.
        backbone_revision: commit of the hub, where known.

    Raises:
        UserError: K does not divide L, the edges are not K + 1, or sizes do not fit one another.
    """

    config: Any
    gradient_checkpointing = False
    run_groups_of_all_processes = False
    """In training with sharded weights, which all processes gather together: run what any of them has samples of."""
    _supports_gradient_checkpointing = True
    # diffusers moves a block out after every call, and misses the parts of ``io``: docs/memory.md has what does.
    _supports_group_offloading = False
    _no_split_modules = ("ReplicaLayer",)

    @register_to_config
    def __init__(
        self,
        num_layers: int = 28,
        num_groups: int = 4,
        intervals: Sequence[float] | None = None,
        residual_attention: ResidualAttention = "probs",
        shared_io: bool = True,
        hidden_size: int = 1536,
        intermediate_size: int = 8960,
        num_attention_heads: int = 12,
        num_key_value_heads: int = 2,
        head_dim: int = 128,
        attention_bias: bool = True,
        qk_norm: bool = False,
        activation: Activation = "silu",
        norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        rope_factor: float = 1.0,
        mrope_section: Sequence[int] = (16, 24, 24),
        mrope_interleaved: bool = False,
        local_layers: Sequence[int] = (),
        local_rope_theta: float = 1e4,
        latent_channels: int = 32,
        sample_size: int = 8,
        patch_size: int = 1,
        time_embedding_size: int = 256,
        initial_scale: float = 0.3,
        pooled_context: int | None = None,
        latents_mean: Sequence[float] = (),
        latents_std: Sequence[float] = (),
        backbone_name: str | None = None,
        backbone_revision: str | None = None,
    ) -> None:
        super().__init__()
        self.intervals = Intervals.uniform(num_groups) if intervals is None else Intervals.from_edges(intervals)
        _check_sizes(num_layers, num_groups, self.intervals, head_dim, mrope_section, residual_attention)
        self.group_size = num_layers // num_groups
        self.layers = nn.ModuleList(
            ReplicaLayer(
                hidden_size,
                intermediate_size,
                num_attention_heads,
                num_key_value_heads,
                head_dim,
                attention_bias=attention_bias,
                qk_norm=qk_norm,
                activation=activation,
                norm_eps=norm_eps,
                time_size=time_embedding_size,
                residual_attention=residual_attention,
                first_of_group=number % self.group_size == 0,
                initial_scale=initial_scale,
                pooled_context=pooled_context,
            )
            for number in range(num_layers)
        )
        self.io = nn.ModuleList(
            LatentIO(latent_channels, patch_size, hidden_size, time_embedding_size, norm_eps)
            for _ in range(1 if shared_io else num_groups)
        )

    def group_of(self, t: float | torch.Tensor) -> int | torch.Tensor:
        """Return the index of the expert of t, a number or a tensor of any shape, in [0, 1] (0 is noise)."""
        return self.intervals.group_of(t)

    def layers_of(self, group: int) -> range:
        """Return the numbers of a group's layers, in depth order; group 0 holds the first."""
        return range(group * self.group_size, (group + 1) * self.group_size)

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor | float,
        context: Context,
        cache: SamplingCache | None = None,
        *,
        groups: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the velocity (data minus noise) at x_t.

        Args:
            x_t: normalised latents on the path, (B, latent_channels, H, W).
            t: times in [0, 1], float32 or float64 (B,), of different intervals if need be; or one number for all.
            context: the backbone's, of B prompts.
            cache: of a sampling path: what steps have in common is computed once. Needs one t for all samples.
            groups: int64 (B,), the expert of each sample, for training; left out, that of its t. Needs a t for each.

        Returns:
            A tensor like ``x_t``.
        """
        if not isinstance(t, torch.Tensor):
            return self.expert(cast(int, self.group_of(t)), x_t, t, context, cache)
        groups = self.intervals.group_of(t) if groups is None else groups
        present = self._groups_to_run(groups)
        if len(present) == 1:
            return self.expert(present[0], x_t, t, context)
        v = torch.empty_like(x_t)
        for group in present:
            index = (groups == group).nonzero()[:, 0]
            if len(index):
                # Trimmed, so that a group computes what it would without the others, to the bit.
                v[index] = self.expert(group, x_t[index], t[index], context.select(index).trim()).to(v.dtype)
            else:
                v = v + self._nothing(group, x_t, context).to(v.dtype)
        return v

    def _groups_to_run(self, groups: torch.Tensor) -> list[int]:
        """Return the groups that samples have, here or, if weights are sharded, in any process; in order."""
        if not (self.run_groups_of_all_processes and torch.is_grad_enabled()):
            return groups.unique().tolist()
        present = torch.bincount(groups, minlength=self.config.num_groups)
        distributed.all_reduce(present)
        return present.nonzero()[:, 0].tolist()

    def _nothing(self, group: int, x_t: torch.Tensor, context: Context) -> torch.Tensor:
        """Run a group on the first sample, and return 0 whatever it makes of it; its weights get the gradient 0."""
        first = torch.zeros(1, dtype=torch.int64, device=x_t.device)
        t = torch.full((1,), self.intervals.bounds(group)[0], device=x_t.device)
        v = self.expert(group, x_t[:1], t, context.select(first).trim())
        return v.masked_fill(torch.ones_like(v, dtype=torch.bool), 0.0).sum()

    def expert(
        self,
        group: int,
        x_t: torch.Tensor,
        t: torch.Tensor | float,
        context: Context,
        cache: SamplingCache | None = None,
    ) -> torch.Tensor:
        """Run one group of layers on samples that all belong to its interval; shapes as in ``forward``."""
        self.enter_group(group)
        rows, columns = (side // self.config.patch_size for side in x_t.shape[-2:])
        if cache is None or isinstance(t, torch.Tensor):
            around = self.surroundings(group, context, rows, columns)
            moment = self._moment(group, x_t, t)
        else:
            around = cache.surroundings(self, group, context, rows, columns)
            moment = cache.moment(self, group, t, x_t.device)
        return self.step(group, x_t, around, moment)

    def step(self, group: int, x_t: torch.Tensor, around: Surroundings, moment: Moment) -> torch.Tensor:
        """Run one group where all around the latents is known; ``moment`` may hold another t for each sample."""
        self.enter_group(group)
        layers = [self.layers[number] for number in self.layers_of(group)]
        return self._through(layers, self.io_of(group), x_t, around, moment)

    def _through(
        self, layers: Sequence[nn.Module], io: LatentIO, x_t: torch.Tensor, around: Surroundings, moment: Moment
    ) -> torch.Tensor:
        """Go through a group as the paper's figure draws it: patches, layers, head."""
        x = io.patch_embedding(x_t, around.places)

        attention_map = None
        for layer, time, rotary, context, prompt in zip(layers, moment.layers, *around[:2], around.prompt, strict=True):
            x, attention_map = self._run(
                layer,
                x,
                time,
                rotary=rotary,
                context=context,
                mask=around.mask,
                previous_map=attention_map,
                prompt=prompt,
            )

        return unpatchify(io.velocity(x, *moment.out), self.config.patch_size, *x_t.shape[-2:])

    def enter_group(self, group: int) -> None:
        """Do nothing: whoever holds the weights elsewhere (``models/residency.py``) puts their fetching here."""

    def io_of(self, group: int) -> LatentIO:
        """Return what stands around a group's layers."""
        return cast(LatentIO, self.io[group if len(self.io) > 1 else 0])

    def _moment(self, group: int, x_t: torch.Tensor, t: torch.Tensor | float) -> Moment:
        """Return what each sample's t does; layers are left to make of the embedding what they will."""
        io = self.io_of(group)
        if not isinstance(t, torch.Tensor):
            t = torch.full((len(x_t),), t, device=x_t.device)
        time = io.time_embedding(t)
        return Moment([time] * self.group_size, io.modulation_of(time))

    def surroundings(self, group: int, context: Context, rows: int, columns: int) -> Surroundings:
        """Return what is the same for a group at every t, for a grid of tokens behind each prompt."""
        rotary, local_rotary = self._rotary(context.next_position, rows, columns)
        numbers = self.layers_of(group)
        return Surroundings(
            [local_rotary if number in self.config.local_layers else rotary for number in numbers],
            [context.layer(number) for number in numbers],
            _visible(context.mask, rows * columns),
            self.io_of(group).patch_embedding.places_of(rows, columns),
            [None] * len(numbers),
        )

    def _run(self, layer: nn.Module, *given: Any, **named: Any) -> Any:
        """Call a layer; with gradient checkpointing, forget its activations until they are needed."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return cast(Any, self._gradient_checkpointing_func)(partial(layer, **named), *given)
        return layer(*given, **named)

    def _rotary(
        self, start: torch.Tensor, rows: int, columns: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Return cosine and sine of a grid behind each prompt, for ordinary and for local layers."""
        config = self.config
        axes = axes_of_frequencies(config.mrope_section, interleaved=config.mrope_interleaved)
        positions = (grid_positions if axes else raster_positions)(start, rows, columns)
        rotary = rotary_cos_sin(
            positions, head_dim=config.head_dim, theta=config.rope_theta, axes=axes, factor=config.rope_factor
        )
        if not config.local_layers:
            return rotary, rotary
        return rotary, rotary_cos_sin(positions, head_dim=config.head_dim, theta=config.local_rope_theta, axes=axes)

    @classmethod
    def from_backbone(cls, backbone: nn.Module, **settings: Any) -> LatteFlowTransformer:
        """Build the replica of a backbone's text layers, weights copied, in its dtype and on its device.

        Args:
            backbone: a transformers vision-language model of a family in docs/backbones.md.
            **settings: the arguments of this class that the backbone does not decide, such as ``num_groups``,
                ``latent_channels``, ``residual_attention``.

        Raises:
            UserError: the backbone's layers are not of a kind that the replica knows.
        """
        family = family_of(backbone.config)
        settings = {**family.replica_config(backbone), **settings}
        with torch.device("meta"):  # a weight that is copied need not be drawn, nor held twice
            replica = cls(**settings)
        nn.Module.to(replica, cast(Any, backbone).dtype)  # diffusers' own warns where nothing is to be warned of
        replica.to_empty(device=cast(Any, backbone).device)
        replica.initialize_additions()
        text = cast(Any, backbone).config.get_text_config()
        for source, target in zip(family.text_model(backbone).layers, replica.layers, strict=True):
            family.copy_layer(source, target, text)
        return replica

    def initialize_additions(self) -> None:
        """Set what has no counterpart in the backbone to its start."""
        for layer in self.layers:
            cast(ReplicaLayer, layer).initialize_additions()
        for io in self.io:
            cast(LatentIO, io).initialize()


def _visible(context_mask: torch.Tensor, image_tokens: int) -> torch.Tensor | None:
    """Return which keys latents see, bool (B, 1, 1, T + N): every word that is not padding, and each other."""
    if bool(context_mask.all()):
        return None  # nothing to hide: attention without a mask is faster
    latents = context_mask.new_ones(len(context_mask), image_tokens)
    return torch.cat([context_mask, latents], dim=1)[:, None, None]


def _check_sizes(
    num_layers: int,
    num_groups: int,
    intervals: Intervals,
    head_dim: int,
    mrope_section: Sequence[int],
    residual_attention: str,
) -> None:
    if num_groups < 1 or num_layers % num_groups:
        raise UserError(f"num_groups has to divide the {num_layers} layers: got {num_groups}")
    if len(intervals) != num_groups:
        raise UserError(f"{num_groups} groups need {num_groups + 1} edges: got {list(intervals.edges)}")
    if mrope_section and sum(mrope_section) * 2 != head_dim:
        raise UserError(f"mrope_section has to sum to half of head_dim {head_dim}: got {list(mrope_section)}")
    if residual_attention not in ("probs", "logits", "none"):
        raise UserError(f"residual_attention is probs, logits or none: got {residual_attention!r}")
