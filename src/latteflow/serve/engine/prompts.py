"""Prompts to contexts for many requests: those that come together are read together, and the last ones are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from latteflow.errors import UserError
from latteflow.models.context import Context
from latteflow.models.conversation import ConversationCache
from latteflow.pipeline import LatteFlowPipeline
from latteflow.serve.engine.requests import DrawRequest

_MOST = 64


class Prompts:
    """Contexts of words by the words, and of conversations.

    Args:
        pipe: whose backbone reads.
        alone: read every prompt by itself, so that its bits do not depend on what it came with.
    """

    def __init__(self, pipe: LatteFlowPipeline, *, alone: bool = False) -> None:
        self._pipe, self._alone = pipe, alone
        self._kept: OrderedDict[str, Context] = OrderedDict()

    def read(self, requests: Sequence[DrawRequest]) -> list[tuple[Context, Context | None] | UserError]:
        """Return each request's context and, if it is guided, that of its negative prompt; or what is wrong with it."""
        words = [request.prompt for request in requests if isinstance(request.prompt, str)]
        words += [request.negative_prompt for request in requests if request.guidance_scale != 1]
        missing = [each for each in dict.fromkeys(words) if each not in self._kept]
        found = dict(self._kept) | self._read_together(missing)
        results: list[tuple[Context, Context | None] | UserError] = []
        for request in requests:
            try:
                results.append((self._context(request.prompt, found), self._negative(request, found)))
            except UserError as error:
                results.append(error)
        self._keep(words, found)
        return results

    def _read_together(self, words: Sequence[str]) -> dict[str, Context]:
        """Return contexts of words, all in one call; none, if there is something wrong with one of them."""
        if self._alone or len(words) < 2:
            return {}
        try:
            together = self._pipe.encode_prompt(words)
        except UserError:
            return {}
        rows = torch.arange(len(words), device=together.mask.device).split(1)
        return {each: together.select(row).trim() for each, row in zip(words, rows, strict=True)}

    def _context(self, prompt: object, found: dict[str, Context]) -> Context:
        if not isinstance(prompt, str):
            return ConversationCache(self._pipe.backbone, self._pipe.processor).context(prompt)  # type: ignore[arg-type]
        if prompt not in found:
            found[prompt] = self._pipe.encode_prompt([prompt])
        return found[prompt]

    def _negative(self, request: DrawRequest, found: dict[str, Context]) -> Context | None:
        return None if request.guidance_scale == 1 else self._context(request.negative_prompt, found)

    def _keep(self, words: Sequence[str], found: dict[str, Context]) -> None:
        """Keep the prompts that were used last; the empty one is used by almost everybody."""
        for each in words:
            if each in found:
                self._kept.pop(each, None)
                self._kept[each] = found[each]
        while len(self._kept) > _MOST:
            self._kept.popitem(last=False)
