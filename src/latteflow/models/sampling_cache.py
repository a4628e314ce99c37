"""What a run over known times needs beside the latents, each thing computed once.

Along a sampling path the prompt, the picture's size and the times are known from the start, and every sample of a step
is at the same t. So rotary angles, masks and places are made once a context, and what t does to a group's layers once
for all of the group's steps, in one product a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from latteflow.models.context import Context
from latteflow.nn.block import Modulation

if TYPE_CHECKING:
    from latteflow.models.transformer import LatteFlowTransformer


class Surroundings(NamedTuple):
    """What stands around the latents of a group's call, whatever t is."""

    rotary: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """For each of the group's layers cosine and sine, each (B, N, head_dim)."""
    context: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """For each the backbone layer's keys and values, each (B, key/value heads, T, head_dim)."""
    mask: torch.Tensor | None
    """Which keys latents see, bool (B, 1, 1, T + N); None where they see all."""
    places: torch.Tensor
    """What the patch embedding adds for the place in the grid, (N, hidden_size)."""
    prompt: Sequence[torch.Tensor | None]
    """For each what the whole prompt adds, (B, 1, hidden_size); None where nothing, or left to the layer to compute."""


class Moment(NamedTuple):
    """What t does to a group."""

    layers: Sequence[torch.Tensor | Modulation]
    """For each of the group's layers the time embedding (B, time_size), or what the layer makes of it."""
    out: tuple[torch.Tensor, torch.Tensor]
    """Shift and scale in front of the head, each (B, 1, hidden_size)."""


class SamplingCache:
    """Kept by whoever calls the transformer, from a path's first step to its last, and handed to each call.

    Args:
        times: of the steps to come. Others are computed when they are met.
    """

    def __init__(self, times: Sequence[float]) -> None:
        self._times = sorted(set(times))
        self._moments: dict[float, Moment] = {}
        self._surroundings: dict[tuple[int, ...], tuple[Context, Surroundings]] = {}

    def surroundings(
        self, transformer: LatteFlowTransformer, group: int, context: Context, rows: int, columns: int
    ) -> Surroundings:
        """Return ``whole_surroundings``; no context is looked at twice."""
        key = (id(context), group, rows, columns)
        if key not in self._surroundings:
            # The context is kept, so that no other can get its id.
            self._surroundings[key] = (context, whole_surroundings(transformer, group, context, rows, columns))
        return self._surroundings[key][1]

    def moment(self, transformer: LatteFlowTransformer, group: int, t: float, device: torch.device) -> Moment:
        """Return what t does to its group, in the transformer's dtype; B is 1. Latents are on ``device``."""
        if t not in self._moments:
            times = [time for time in self._times if transformer.group_of(time) == group] if t in self._times else [t]
            self._moments.update(zip(times, self._all_at_once(transformer, group, times, device), strict=True))
        return self._moments[t]

    @staticmethod
    def _all_at_once(
        transformer: LatteFlowTransformer, group: int, times: Sequence[float], device: torch.device
    ) -> list[Moment]:
        io = transformer.io_of(group)
        # A product of one row goes another way in CPU libraries, where the weights' place in memory decides the bits.
        rows = list(times) * (2 if len(times) == 1 else 1)
        time = io.time_embedding(torch.tensor(rows, dtype=torch.float32, device=device))
        layers = [_rows(transformer.layers[number].modulation_of(time)) for number in transformer.layers_of(group)]
        shift, scale = (part.split(1) for part in io.modulation_of(time))
        return [Moment([layer[i] for layer in layers], (shift[i], scale[i])) for i in range(len(times))]


def whole_surroundings(
    transformer: LatteFlowTransformer, group: int, context: Context, rows: int, columns: int
) -> Surroundings:
    """Return what ``transformer.surroundings`` does, and what the prompts add."""
    around = transformer.surroundings(group, context, rows, columns)
    layers = [transformer.layers[number] for number in transformer.layers_of(group)]
    prompt = [layer.prompt_of(words, around.mask) for layer, words in zip(layers, around.context, strict=True)]
    return around._replace(prompt=prompt)


def joined(moments: Sequence[Moment]) -> Moment:
    """Return the moment of samples that are each at a t of their own, of moments that ``SamplingCache`` made."""
    layers = [_joined(modulations) for modulations in zip(*(moment.layers for moment in moments), strict=True)]
    shift, scale = (torch.cat(parts) for parts in zip(*(moment.out for moment in moments), strict=True))
    return Moment(layers, (shift, scale))


def _joined(modulations: Sequence[Modulation]) -> Modulation:
    *scales, gates = zip(*modulations, strict=True)
    return Modulation(*map(torch.cat, scales), gate=None if gates[0] is None else torch.cat(gates))


def _rows(modulation: Modulation) -> list[Modulation]:
    """Return what is done at each of the times."""
    *scales, gate = modulation
    gates = [None] * len(scales[0]) if gate is None else gate.split(1)
    return [Modulation(*parts) for parts in zip(*(part.split(1) for part in scales), gates, strict=True)]
