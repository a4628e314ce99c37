"""One layer of the replica, as the paper's figure draws it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from latteflow.nn.attention import Attention
from latteflow.nn.embeddings import PooledContext
from latteflow.nn.feed_forward import Activation, FeedForward
from latteflow.nn.norm import RMSNorm, modulate
from latteflow.nn.residual_attention import ResidualAttention, ResidualGate


class Modulation(NamedTuple):
    """What t does to a layer; B is 1 where all samples are at one t."""

    attention_scale: torch.Tensor
    """(B, 1, hidden_size), as are the next three."""
    mlp_shift: torch.Tensor
    mlp_scale: torch.Tensor
    mlp_out_scale: torch.Tensor
    gate: torch.Tensor | None
    """g(t) of residual attention, (B, heads, 1, 1); None in the first layer of a group."""


class ReplicaLayer(nn.Module):
    """RMS, attention, RMS, scale(t), residual; RMS, scale and shift(t), feed-forward, RMS, scale(t), residual.

    ``input_layernorm``, ``self_attn``, ``post_attention_layernorm`` and ``mlp`` are the backbone layer's, by name and
    by value; the two output norms, the modulation and the gate are what the paper adds around them.

    Args:
        hidden_size: width of the stream.
        intermediate_size: width inside the feed-forward.
        num_heads: query heads.
        num_key_value_heads: key and value heads.
        head_dim: width of a head.
        attention_bias: whether queries, keys and values have a bias.
        qk_norm: whether every head's queries and keys are normalised.
        activation: of the feed-forward.
        norm_eps: eps of all norms.
        time_size: width of the time embedding.
        residual_attention: how attention maps are carried.
        first_of_group: the first layer of a group has no predecessor, hence no gate.
        initial_scale: scale(t) of both branches at the start.
        pooled_context: width inside the perceptron that adds the whole prompt to every token; None for no such path.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        attention_bias: bool,
        qk_norm: bool = False,
        activation: Activation = "silu",
        norm_eps: float,
        time_size: int,
        residual_attention: ResidualAttention,
        first_of_group: bool,
        initial_scale: float,
        pooled_context: int | None = None,
    ) -> None:
        super().__init__()
        value_size = num_key_value_heads * head_dim
        self.pooled = (
            None if pooled_context is None else PooledContext(value_size, pooled_context, hidden_size, norm_eps)
        )
        self.input_layernorm = RMSNorm(hidden_size, norm_eps)
        self.self_attn = Attention(
            hidden_size,
            num_heads,
            num_key_value_heads,
            head_dim,
            bias=attention_bias,
            qk_norm_eps=norm_eps if qk_norm else None,
            mode=residual_attention,
        )
        self.attention_out_norm = RMSNorm(hidden_size, norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps)
        self.mlp = FeedForward(hidden_size, intermediate_size, activation)
        self.mlp_out_norm = RMSNorm(hidden_size, norm_eps)
        self.modulation = nn.Linear(time_size, 4 * hidden_size)
        carries = residual_attention != "none" and not first_of_group
        self.gate = ResidualGate(time_size, num_heads) if carries else None
        self.initial_scale = initial_scale
        self.initialize_additions()

    @torch.no_grad()
    def initialize_additions(self) -> None:
        """Set what the paper adds around the copied parts to its start. All are [D]: the paper gives no values."""
        # The output norms start neutral: each branch enters the stream with unit spread times scale(t).
        nn.init.ones_(self.attention_out_norm.weight)
        nn.init.ones_(self.mlp_out_norm.weight)
        # No dependence on t at the start: every t begins from the same, copied, layer.
        nn.init.zeros_(self.modulation.weight)
        # scale(t) of both branches starts small but open, so that the copied weights act, and learn, at once;
        # scale and shift in front of the feed-forward start neutral, so that it sees what the backbone's would.
        attention_scale, mlp_shift, mlp_scale, mlp_out_scale = self.modulation.bias.chunk(4)
        attention_scale.fill_(self.initial_scale)
        mlp_shift.zero_()
        mlp_scale.zero_()
        mlp_out_scale.fill_(self.initial_scale)
        # A closed gate: the plain replica.
        if self.gate is not None:
            nn.init.zeros_(self.gate.project.weight)
            nn.init.zeros_(self.gate.project.bias)
        if self.pooled is not None:
            self.pooled.initialize()

    def modulation_of(self, time: torch.Tensor) -> Modulation:
        """Map the time embedding (B, time_size) to what it does to this layer, for later calls.

        ``forward`` does not call it: where weights are sharded, each of the two has them gathered for itself.
        """
        return self._at(time)

    def _at(self, time: torch.Tensor) -> Modulation:
        parts = self.modulation(functional.silu(time))[:, None].chunk(4, dim=-1)
        return Modulation(*parts, gate=None if self.gate is None else self.gate(time))

    def prompt_of(
        self, context: tuple[torch.Tensor, torch.Tensor] | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return what the whole prompt adds to every token, (B, 1, hidden_size), for later calls; None for nothing.

        Arguments as in ``forward``, which does not call it, for the reason that ``modulation_of`` gives.
        """
        return self._prompt(context, mask)

    def _prompt(
        self, context: tuple[torch.Tensor, torch.Tensor] | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        if self.pooled is None or context is None:
            return None
        values = context[1]
        return self.pooled(values, None if mask is None else mask[:, 0, 0, : values.shape[2]])

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor | Modulation,
        *,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None = None,
        previous_map: torch.Tensor | None = None,
        prompt: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the stream after this layer, (B, N, hidden_size), and the layer's attention map.

        Args:
            x: the latents' stream, (B, N, hidden_size).
            time: the time embedding, (B, time_size), or what ``modulation_of`` made of it before.
            rotary: cosine and sine (B, N, head_dim).
            context: the backbone layer's keys and values, each (B, key/value heads, T, head_dim).
            mask: bool, broadcastable to (B, heads, N, T + N), true where a key may be seen.
            previous_map: the map of the layer before in this group, (B, heads, N, N).
            prompt: what ``prompt_of`` returned before.
        """
        at = time if isinstance(time, Modulation) else self._at(time)
        prompt = self._prompt(context, mask) if prompt is None else prompt

        if prompt is not None:
            x = x + prompt

        h = self.input_layernorm(x)
        h, attention_map = self.self_attn(
            h,
            rotary=rotary,
            context=context,
            mask=mask,
            gate=at.gate,
            previous_map=previous_map,
        )
        x = x + at.attention_scale * self.attention_out_norm(h)

        h = modulate(self.post_attention_layernorm(x), at.mlp_shift, at.mlp_scale)
        x = x + at.mlp_out_scale * self.mlp_out_norm(self.mlp(h))
        return x, attention_map
