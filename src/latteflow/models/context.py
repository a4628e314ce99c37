"""The context: the backbone's per-layer keys and values of a prompt, computed once and read at every step.

Words never see latents, so nothing in the context depends on t. Group k reads its own layers' slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from latteflow.errors import UserError
from latteflow.models.backbones import family_of
from latteflow.models.backbones.family import Family


@dataclass(frozen=True)
class Context:
    """Keys and values of B prompts of up to T tokens, for all L layers of the backbone.

    Padding stands at the end of a prompt and is never attended to.
    """

    keys: torch.Tensor
    """(B, L, key/value heads, T, head_dim), after rotary embedding, as the backbone caches them."""
    values: torch.Tensor
    """Like ``keys``."""
    mask: torch.Tensor
    """bool (B, T), true where there is a token."""
    next_position: torch.Tensor
    """int64 (B,), the first rotary position after each prompt."""
    first_layer: int = 0
    """The backbone layer that stands first in ``keys`` and ``values``: whoever runs one group needs no other layers."""

    def __len__(self) -> int:
        return len(self.mask)

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of one backbone layer, each (B, key/value heads, T, head_dim)."""
        return self.keys[:, number - self.first_layer], self.values[:, number - self.first_layer]

    def of_layers(self, numbers: range) -> Context:
        """Return the context of some backbone layers alone, in a row."""
        these = slice(numbers.start - self.first_layer, numbers.stop - self.first_layer)
        return replace(self, keys=self.keys[:, these], values=self.values[:, these], first_layer=numbers.start)

    def select(self, index: torch.Tensor) -> Context:
        """Return the context of prompts ``index``, int64 or bool (B,)."""
        return replace(
            self,
            keys=self.keys[index],
            values=self.values[index],
            mask=self.mask[index],
            next_position=self.next_position[index],
        )

    def trim(self) -> Context:
        """Return the context without the columns at the end that are padding in every prompt."""
        longest = int(self.mask.sum(-1).max())
        return replace(
            self,
            keys=self.keys[..., :longest, :],
            values=self.values[..., :longest, :],
            mask=self.mask[:, :longest],
        )

    def padded_to(self, tokens: int) -> Context:
        """Return the context with T ``tokens``, no fewer than it has: padding is added at the end."""
        missing = tokens - self.mask.shape[1]
        if missing == 0:
            return self
        return replace(
            self,
            keys=nn.functional.pad(self.keys, (0, 0, 0, missing)),
            values=nn.functional.pad(self.values, (0, 0, 0, missing)),
            mask=nn.functional.pad(self.mask, (0, missing)),
        )

    def repeat_interleave(self, times: int) -> Context:
        """Return the context with each prompt ``times`` times in a row."""
        return self.select(torch.arange(len(self), device=self.mask.device).repeat_interleave(times))

    def to(self, *args: Any, **kwargs: Any) -> Context:
        """Move to a device, or bring keys and values to a dtype, as ``Tensor.to`` does."""
        keys = self.keys.to(*args, **kwargs)
        return replace(
            self,
            keys=keys,
            values=self.values.to(*args, **kwargs),
            mask=self.mask.to(keys.device),
            next_position=self.next_position.to(keys.device),
        )


def concatenate(contexts: Sequence[Context]) -> Context:
    """Return one context of all prompts, padded to the longest; all are of the same layers."""
    longest = max(context.mask.shape[1] for context in contexts)
    padded = [context.padded_to(longest) for context in contexts]
    return replace(
        padded[0],
        keys=torch.cat([context.keys for context in padded]),
        values=torch.cat([context.values for context in padded]),
        mask=torch.cat([context.mask for context in padded]),
        next_position=torch.cat([context.next_position for context in padded]),
    )


@torch.no_grad()
def compute_context(
    backbone: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **pictures: torch.Tensor
) -> Context:
    """Prefill the backbone with prompts and return what it would cache.

    Args:
        backbone: a transformers vision-language model of a known family.
        input_ids: int64 (B, T), padded at the end.
        attention_mask: (B, T), 1 where there is a token.
        **pictures: the processor's other outputs, where prompts hold pictures.

    Raises:
        ValueError: a prompt is padded in front: its words would not stand where they stand alone.
        UserError: a prompt is longer than every layer of the backbone can see.
    """
    if not bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all()):
        raise ValueError("prompts have to be padded at the end, not in front")
    family, text = family_of(backbone.config), backbone.config.get_text_config()
    check_length(family, text, input_ids.shape[1])
    positions, next_position = family.positions(backbone, input_ids, attention_mask, pictures)
    cache = DynamicCache(config=text)
    backbone(  # as a whole, so that offloading hooks see the call
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **pictures,
    )
    return context_of_cache(cache, attention_mask.bool(), next_position)


def check_length(family: Family, text: Any, tokens: int) -> None:
    """Refuse a prompt that some layers no longer see whole.

    Raises:
        UserError: it is longer than the window.
    """
    longest = family.longest_prompt(text)
    if longest is not None and tokens > longest:
        raise UserError(
            f"the prompt has {tokens} tokens; some layers of this backbone see a window of {longest}, so their keys "
            "and values of what stands before it are gone: shorten it"
        )


def context_of_cache(cache: DynamicCache, mask: torch.Tensor, next_position: torch.Tensor) -> Context:
    """Return the context that a backbone's cache holds.

    Args:
        cache: of B prompts of T tokens, every layer whole.
        mask: bool (B, T), true where there is a token.
        next_position: int64 (B,), the first rotary position after each prompt.
    """
    return Context(
        torch.stack([layer.keys for layer in cache.layers], dim=1),  # type: ignore[misc]
        torch.stack([layer.values for layer in cache.layers], dim=1),  # type: ignore[misc]
        mask,
        next_position,
    )
