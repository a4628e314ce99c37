"""A latteflow model for VLMEvalKit, which keeps its models in a table and has no other door for more.

    from latteflow.evaluate import vlmevalkit
    vlmevalkit.register("emoji-64")          # before the toolkit's own run.py, with --model emoji-64

``LatteFlow`` is a subclass of the toolkit's ``BaseModel``, made when it is asked for, so that this module can be
imported without the toolkit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

from latteflow.errors import UserError

_INSTALL = "VLMEvalKit is not complete ({}): install it in an environment of its own (docs/evaluation.md)"


class VlmEvalKitAnswers:
    """The methods of a model as VLMEvalKit calls them; ``LatteFlow`` joins them with the toolkit's base class.

    Words and pictures stand in the order in which a data set gives them, in one user turn of the backbone's own chat
    template. No data set has a prompt of its own here.

    Args:
        model: an embedded model's name, a folder, or a model of the hub.
        alone: score the backbone from its own files, without the rest of the model, to compare with.
        device: left out, cuda where there is one, else cpu.
        dtype: float32, bfloat16 or float16.
        max_new_tokens: where a long answer is cut.
        **settings: of transformers' ``generate``; left out, greedy.

    Raises:
        UserError: a model that cannot be loaded.
    """

    INTERLEAVE = True

    def __init__(
        self,
        model: str = "emoji-64",
        *,
        alone: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int = 512,
        **settings: Any,
    ) -> None:
        from latteflow.evaluate.understanding import FrozenBackbone

        super().__init__()
        self._frozen = FrozenBackbone.of_model(model, alone=alone, device=device, dtype=dtype)
        self._settings = {"max_new_tokens": max_new_tokens, **settings}

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """Return the answer to one user turn.

        Args:
            message: parts, each with a ``type`` ("text" or "image") and a ``value`` (words, or a picture's file).
            dataset: its name, not used.

        Raises:
            UserError: a part that is neither, or a picture that cannot be read.
        """
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Return the next turn of a conversation, whose turns hold parts as ``generate_inner`` takes them.

        Raises:
            UserError: a part that is neither words nor a picture, or a picture that cannot be read.
        """
        turns = [{"role": turn["role"], "content": [_part(part) for part in turn["content"]]} for turn in message]
        return self._frozen.answer(turns, **self._settings)


def _part(part: Mapping[str, str]) -> dict[str, Any]:
    from PIL import Image

    kind, value = part.get("type"), part.get("value", "")
    if kind == "text":
        return {"type": "text", "text": value}
    if kind != "image":
        raise UserError(f"a part of a message is text or an image: got {kind!r}, which the backbone is not asked about")
    try:
        with Image.open(value) as picture:
            picture.load()
            return {"type": "image", "image": picture.copy()}
    except OSError as error:
        raise UserError(f"{value} cannot be read as a picture: {error}") from error


@cache
def _model_class() -> type:
    try:
        from vlmeval.vlm.base import BaseModel  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise UserError(_INSTALL.format(f"no {error.name}")) from error
    own = {"__module__": __name__, "__doc__": "A latteflow model for VLMEvalKit; see ``VlmEvalKitAnswers``."}
    return type("LatteFlow", (VlmEvalKitAnswers, BaseModel), own)


def register(model: str, name: str | None = None, **settings: Any) -> None:
    """Put a model into VLMEvalKit's table, from which its command takes models by name.

    Args:
        model: an embedded model's name, a folder, or a model of the hub.
        name: what ``--model`` calls it; left out, ``model``.
        **settings: further arguments of ``LatteFlow``, such as ``alone=True``.

    Raises:
        UserError: the toolkit is not installed.
    """
    made = _model_class()
    from vlmeval.config import supported_VLM  # type: ignore[import-not-found]

    supported_VLM[name or model] = partial(made, model, **settings)


def __getattr__(name: str) -> Any:
    if name == "LatteFlow":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
