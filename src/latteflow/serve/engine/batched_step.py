"""One forward of one expert for pictures at different times of its interval, with prompts and guidance of their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from latteflow.flow.guidance import guide
from latteflow.models.compilation import runs_compiled
from latteflow.models.context import Context, concatenate
from latteflow.models.sampling_cache import Moment, SamplingCache, Surroundings, joined, whole_surroundings
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.serve.engine.drawing import Drawing

_MOST_GRIDS = 32
"""Step grids whose moments are kept: clients choose step counts, and each grid takes a few MB of a large model."""

_WORDS = 32
"""Regular forwards have prompts of a multiple of this many tokens."""


class BatchedStep:
    """The velocities of pictures that share an expert and a size, whatever their times.

    Args:
        transformer: the replica.
        rows: how many rows every forward is padded to, two a picture where it is guided; None for no padding. With
            padding a picture's bits do not depend on what shares its forwards.

    A forward is *regular* where its rows are padded, or the groups are compiled: it has two rows at least, prompts are
    padded to a multiple of 32 tokens, one of padding at least, and every row has a moment of its own. Otherwise more
    graphs would be compiled: for one row, for every length of prompts, without a mask, and for times that are equal.
    """

    def __init__(self, transformer: LatteFlowTransformer, rows: int | None = None) -> None:
        self.transformer, self.rows = transformer, rows
        self.regular = rows is not None or runs_compiled(transformer)
        self._dtype = transformer.dtype  # asked once: diffusers walks all modules to tell it
        self._grids: OrderedDict[tuple[float, ...], SamplingCache] = OrderedDict()
        self._around: dict[int, tuple[tuple[object, ...], Surroundings]] = {}

    def kind(self, drawing: Drawing) -> tuple[int, ...]:
        """Return what pictures must have in common to share a forward: expert, size, and length of regular prompts."""
        longest = max(context.mask.shape[1] for context in (drawing.conditional, drawing.unconditional) if context)
        words = (longest // _WORDS + 1) * _WORDS if self.regular else 0
        return (int(self.transformer.group_of(drawing.t)), *drawing.x_t.shape[1:], words)

    def forget(self) -> None:
        """Let go of the contexts of the last forwards."""
        self._around.clear()

    @torch.no_grad()
    def __call__(self, drawings: Sequence[Drawing]) -> torch.Tensor:
        """Return the velocities, guided where they are, (pictures, channels, H, W); all are of one ``kind``."""
        group, *_, words = self.kind(drawings[0])
        guided = [drawing for drawing in drawings if drawing.guided]
        rows = [*guided, *drawings]  # the unconditional ones first
        x_t = torch.cat([drawing.x_t for drawing in rows])
        moments = [self._moment(group, drawing) for drawing in rows]
        around = self._surroundings(group, guided, drawings, words, x_t)
        missing = self._rows(len(rows)) - len(rows)
        if missing:
            x_t = torch.cat([x_t, x_t[-1:].expand(missing, -1, -1, -1)])
            moments += moments[-1:] * missing
        same = not self.regular and all(moment is moments[0] for moment in moments)
        moment = moments[0] if same else joined(moments)  # one is broadcast
        v = self.transformer.step(group, x_t.to(self._dtype), around, moment).to(drawings[0].x_t.dtype)
        return _guided(v[: len(rows)], guided, drawings)

    def _moment(self, group: int, drawing: Drawing) -> Moment:
        times = drawing.solver.times
        if times not in self._grids:
            self._grids[times] = SamplingCache(times)
        self._grids.move_to_end(times)
        if len(self._grids) > _MOST_GRIDS:
            self._grids.popitem(last=False)
        return self._grids[times].moment(self.transformer, group, drawing.t, drawing.x_t.device)

    def _surroundings(
        self, group: int, guided: Sequence[Drawing], drawings: Sequence[Drawing], words: int, x_t: torch.Tensor
    ) -> Surroundings:
        """Return what surrounds the rows; as long as the same pictures share a group's forwards, it is made once."""
        key = (tuple(guided), tuple(drawings), *x_t.shape[2:])
        kept = self._around.get(group)
        if kept is None or kept[0] != key:
            numbers = self.transformer.layers_of(group)
            contexts = [drawing.unconditional for drawing in guided] + [drawing.conditional for drawing in drawings]
            context = concatenate([context.of_layers(numbers) for context in contexts if context is not None])
            patch = self.transformer.config.patch_size
            context = self._padded(context, words)
            around = whole_surroundings(self.transformer, group, context, x_t.shape[2] // patch, x_t.shape[3] // patch)
            kept = self._around[group] = (key, around)
        return kept[1]

    def _padded(self, context: Context, words: int) -> Context:
        """Return the context with every row and column that a forward has."""
        rows = self._rows(len(context))
        if rows > len(context):
            context = context.select(torch.arange(rows, device=context.mask.device).clamp_max(len(context) - 1))
        return context.padded_to(words) if self.regular else context

    def _rows(self, number: int) -> int:
        """Return how many rows a forward of a number of them has."""
        return self.rows or (max(number, 2) if self.regular else number)


def _guided(v: torch.Tensor, guided: Sequence[Drawing], drawings: Sequence[Drawing]) -> torch.Tensor:
    """Return a velocity a picture, of the unconditional ones of those that are guided, and the conditional of all."""
    v_unconditional, v_conditional = v[: len(guided)], v[len(guided) :]
    if not guided:
        return v_conditional
    scales = {drawing.guidance.scale for drawing in guided}
    if len(guided) == len(drawings) and len(scales) == 1:
        return guide(v_conditional, v_unconditional, scales.pop())
    unconditional = dict(zip(guided, v_unconditional, strict=True))
    return torch.stack(
        [
            guide(v, unconditional[drawing], drawing.guidance.scale) if drawing in unconditional else v
            for v, drawing in zip(v_conditional, drawings, strict=True)
        ]
    )
