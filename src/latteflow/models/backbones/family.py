"""What the replica and the processor have to know of a family of vision-language models.

A family is one file with one subclass of ``Family``: where its text layers are, what they hold beyond the common, and
what stands in the prompt for a picture. The steps of adding one are in docs/backbones.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn

from latteflow.errors import UserError

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_TYPES = ("default", "mrope", "linear", "dynamic")
_REASONS = {
    "cross_attn": "cross-attention",
    "linear_attn": "linear attention",
    "mamba": "state-space",
    "block_sparse_moe": "mixture-of-experts",
}


class Family:
    """The common case: decoder layers of the Llama kind, words numbered one after the other.

    Subclasses set the class variables and override what differs.
    """

    model_types: ClassVar[tuple[str, ...]]
    """``config.model_type`` of the backbones."""
    text_types: ClassVar[tuple[str, ...]]
    """``model_type`` of the text configurations whose layers were checked."""
    example: ClassVar[str]
    """A hub id."""
    placeholder: ClassVar[str]
    """What the chat template writes for one picture."""
    image_token: ClassVar[str]
    """What is repeated in its place, once for each of the picture's tokens."""
    token_types: ClassVar[str | None] = None
    """Name of the model input that tells picture tokens from words, if there is one."""
    pictures_are_independent: ClassVar[bool] = True
    """Whether a picture's tokens are the same whatever other pictures stand in the conversation."""
    parts: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "input_layernorm",
        "self_attn": "self_attn",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp": "mlp",
    }
    """Parts of the backbone's layer, and the replica's part that starts from each."""

    def text_model(self, backbone: Any) -> Any:
        """Return the part that holds ``layers``."""
        return backbone.model.language_model

    def replica_config(self, backbone: Any) -> dict[str, Any]:
        """Return the replica's arguments that this backbone decides.

        Raises:
            UserError: the layers do something that the replica cannot.
        """
        text = backbone.config.get_text_config()
        layers = self.text_model(backbone).layers
        for number, layer in enumerate(layers):
            self._check_layer(number, layer)
        attention = layers[0].self_attn
        activation = getattr(text, "hidden_activation", None) or text.hidden_act
        if activation not in _ACTIVATIONS:
            raise UserError(f"activation {activation!r} of the backbone's feed-forward is not supported")
        return {
            "num_layers": len(layers),
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            "attention_bias": attention.q_proj.bias is not None,
            "qk_norm": hasattr(attention, "q_norm"),
            "activation": _ACTIVATIONS[activation],
            "norm_eps": text.rms_norm_eps,
            **self.rope_config(text),
        }

    def rope_config(self, text: Any) -> dict[str, Any]:
        """Return the replica's arguments for rotary positions: here one kind of layer, one axis."""
        if any("sliding" in kind for kind in getattr(text, "layer_types", None) or ()):
            raise UserError("layers that attend within a sliding window are not supported in this family")
        return {**rope_arguments(text.rope_parameters), "mrope_section": []}

    def _check_layer(self, number: int, layer: nn.Module) -> None:
        names = {name for name, _ in layer.named_children()}
        for name in sorted(names - set(self.parts)):
            kind = _REASONS.get(name)
            what = f"a {kind} layer" if kind else f"a part {name!r} that the replica has no counterpart of"
            raise UserError(f"layer {number} of the backbone is {what}: not supported")
        for name in sorted(set(self.parts) - names):
            raise UserError(f"layer {number} of the backbone has no {name!r}: its kind of layer is not supported")
        if any(name in ("experts", "gate", "router") for name, _ in layer.mlp.named_children()):
            raise UserError(f"layer {number} of the backbone is a mixture-of-experts layer: not supported")

    @torch.no_grad()
    def copy_layer(self, source: nn.Module, target: nn.Module, text: Any) -> None:
        """Start a replica's layer from the backbone's.

        Raises:
            UserError: a part holds other weights than the replica's.
        """
        for theirs, ours in self.parts.items():
            try:
                getattr(target, ours).load_state_dict(getattr(source, theirs).state_dict(), strict=True)
            except RuntimeError as error:
                reason = "; ".join(line.strip() for line in str(error).splitlines()[1:])
                raise UserError(f"{theirs!r} of the backbone's layers is not supported: {reason}") from error

    def longest_prompt(self, text: Any) -> int | None:
        """Return the most tokens of a prompt that every layer still sees whole; None for no bound but the memory."""
        return None

    def positions(
        self, backbone: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, pictures: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotary positions of prompts padded at the end, and the first free position after each.

        Args:
            backbone: the model.
            input_ids: int64 (B, T).
            attention_mask: (B, T), 1 where there is a token.
            pictures: the other model inputs; empty without a picture.

        Returns:
            int64 (B, T), or (3, B, T) with multimodal rotary positions; and int64 (B,).
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return positions, attention_mask.sum(-1)

    def tokens_per_tile(self, config: Any) -> int:
        """Return how many tokens a picture, or each tile of a cut picture, becomes; 0 where the size decides."""
        return 0

    def pictures(
        self, image_processor: Any, images: Sequence[Sequence[Image.Image]], tokens_per_tile: int
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return the model inputs of pictures, and the words in place of each.

        Args:
            image_processor: the family's own, of transformers.
            images: by prompt, in order of appearance.
            tokens_per_tile: as ``tokens_per_tile`` returned it.
        """
        raise NotImplementedError


def rope_arguments(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return base and stretch of one set of rotary parameters, as transformers writes them down.

    "dynamic" scaling is the plain one within the backbone's trained length, which a prompt for a picture is.

    Raises:
        UserError: another kind of scaling, or heads that turn only in part.
    """
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise UserError(f"rotary positions of type {kind!r} are not supported: {', '.join(_ROPE_TYPES)} are")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("heads that turn only in part (partial_rotary_factor) are not supported")
    return {"rope_theta": rope["rope_theta"], "rope_factor": rope["factor"] if kind == "linear" else 1.0}
