"""Understanding is the frozen backbone's: asking it as evaluation harnesses do, and showing that it is unchanged.

``FrozenBackbone`` is what the harnesses' model classes (``lmms_eval.py``, ``vlmevalkit.py``) are made of. It answers
one conversation at a time: in a batch, shorter prompts are padded, and padding changes the last bits of scores. So what
a unified model scores is what its backbone scores by itself, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latteflow.data.captioned import load_captioned_images
from latteflow.errors import UserError
from latteflow.evaluate.embedded import answers_about, pictures_of_model, shares_of
from latteflow.models.answers import generation_settings
from latteflow.models.backbones import family_of
from latteflow.models.conversation import on_white
from latteflow.models.embedded import embedded_models, resolve_model
from latteflow.models.loading import load_backbone
from latteflow.models.processor import LatteFlowProcessor, Message, parts_of
from latteflow.models.saved import backbone_reference
from latteflow.pipeline import LatteFlowPipeline

if TYPE_CHECKING:
    from typing_extensions import Self

_DTYPES = ("float32", "bfloat16", "float16")


class FrozenBackbone:
    """A model's backbone and processor, asked about one conversation at a time.

    Args:
        backbone: a transformers vision-language model of a known family.
        processor: its processor.
    """

    def __init__(self, backbone: Any, processor: LatteFlowProcessor) -> None:
        self.backbone, self.processor = backbone.eval(), processor
        self._family = family_of(backbone.config)

    @classmethod
    def of_model(cls, model: str, *, alone: bool = False, device: str | None = None, dtype: str | None = None) -> Self:
        """Load a model.

        Args:
            model: an embedded model's name, a folder, or a model of the hub.
            alone: take the backbone from its own files by transformers, without the rest: to compare with.
            device: left out, cuda where there is one, else cpu.
            dtype: float32, bfloat16 or float16; left out, float32 on a CPU and for embedded models, else bfloat16.

        Raises:
            UserError: there is no such dtype, or the model's files are not safe or not complete.
        """
        if dtype is not None and dtype not in _DTYPES:
            raise UserError(f"there is no dtype {dtype!r}: give {', '.join(_DTYPES)}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        exact = torch.device(device).type == "cpu" or model in embedded_models()
        number = getattr(torch, dtype or ("float32" if exact else "bfloat16"))
        if alone:
            backbone, processor = backbone_alone(model, number)
        else:
            pipe = LatteFlowPipeline.from_pretrained(model, dtype=number)
            backbone, processor = pipe.backbone, pipe.processor
        return cls(backbone.to(device), processor)

    @torch.no_grad()
    def answer(self, messages: Sequence[Message], *, max_new_tokens: int, **settings: Any) -> str:
        """Return the backbone's next words.

        Args:
            messages: the conversation, as ``LatteFlowPipeline.chat`` takes it.
            max_new_tokens: where a long answer is cut.
            **settings: of transformers' ``generate``, such as ``do_sample``; left out, greedy.
        """
        inputs = self._inputs(messages)
        chosen = generation_settings(self.backbone, self.processor, settings)
        tokens = self.backbone.generate(**inputs, max_new_tokens=max_new_tokens, **chosen)[0]
        words = tokens[inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(words, skip_special_tokens=True).strip()  # type: ignore[union-attr]

    @torch.no_grad()
    def scores(self, messages: Sequence[Message], answer: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Return the backbone's scores of every token of an answer, and of what follows it.

        Args:
            messages: the conversation.
            answer: the words that are put into the assistant's mouth, as they are.

        Returns:
            The scores (tokens + 1, vocabulary), in the backbone's dtype, row i before token i is known; and the
            answer's token ids, int64 (tokens,).
        """
        inputs = self._inputs(messages)
        ids = self.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        words = ids.to(inputs["input_ids"])
        more = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        if self._family.token_types is not None:
            more[self._family.token_types] = torch.zeros_like(words)
        inputs = {name: torch.cat([value, more[name]], 1) if name in more else value for name, value in inputs.items()}
        pictures = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        known = pictures if "pixel_values" in pictures else {}
        positions, _ = self._family.positions(self.backbone, inputs["input_ids"], inputs["attention_mask"], known)
        number = words.shape[1]
        logits = self.backbone(**inputs, position_ids=positions, logits_to_keep=number + 1, use_cache=False).logits[0]
        return logits, words[0]

    def loss(self, messages: Sequence[Message], answer: str) -> tuple[float, bool]:
        """Return the mean cross entropy of an answer's tokens, in nats, and whether each was the best one.

        Args:
            messages: the conversation.
            answer: in words; space around it is left out, for an answer begins the assistant's turn.

        Raises:
            UserError: the answer is empty.
        """
        if not answer.strip():
            raise UserError("an empty answer has no likelihood: every choice of a task needs words")
        logits, words = self.scores(messages, answer.strip())
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), words)
        return loss.item(), bool((logits[:-1].argmax(dim=-1) == words).all())

    def _inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        parts = [part for message in messages for part in parts_of(message) if part["type"] == "image"]
        images = [on_white(part["image"]) for part in parts]
        found = self.processor([self.processor.conversation(messages)], images)
        inputs = {name: value.to(self.backbone.device) for name, value in found.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.backbone.dtype)
        return inputs


def user_turn(pictures: Sequence[Any], words: str) -> list[Message]:
    """Return a conversation of one turn: PIL pictures first, then words."""
    shown = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": words}]}]


def sampling_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``generate`` that a harness's settings amount to: greedy without a temperature.

    Args:
        settings: with ``temperature``, ``top_p``, ``do_sample`` and ``num_beams``, if any; the rest is the harness's.
    """
    temperature = settings.get("temperature") or 0.0
    chosen: dict[str, Any] = {}
    if temperature > 0 and settings.get("do_sample", True):
        chosen = {"do_sample": True, "temperature": temperature, "top_p": settings.get("top_p")}
    if (settings.get("num_beams") or 1) > 1:
        chosen["num_beams"] = settings["num_beams"]
    return chosen


def backbone_alone(model: str, dtype: torch.dtype = torch.float32) -> tuple[Any, LatteFlowProcessor]:
    """Load a model's backbone from its own files, as transformers does, and the processor; nothing else of the model.

    Args:
        model: an embedded model's name, a folder, or a model of the hub.
        dtype: of the weights.

    Raises:
        UserError: the files are not safe or not complete.
    """
    place = Path(resolve_model(model))
    if not place.is_dir():
        place = Path(LatteFlowPipeline.download(model))
    name, revision = backbone_reference(place) or (str(place / "backbone"), None)
    processor = LatteFlowProcessor.from_pretrained(place / "processor")
    return load_backbone(name, revision, dtype), processor  # type: ignore[return-value]


def heldout_understanding(
    model: str, data: Path, *, pictures: int | None = None, pipe: LatteFlowPipeline | None = None
) -> dict[str, Any]:
    """Ask a unified model and its backbone alone about held-out pictures, and say whether they answer alike.

    The unified model draws first, so that what drawing might leave behind would show.

    Args:
        model: an embedded model's name, or the folder of a model that ``latteflow train`` wrote.
        data: the folder that ``latteflow data emoji`` wrote.
        pictures: how many, spread evenly; left out, all.
        pipe: the model, where it is loaded already; the backbone alone is then asked on its device, in its dtype.

    Returns:
        ``pictures`` and ``questions`` asked, the shares of exact answers of ``backbone`` and ``unified``, how many
        ``different_answers`` there are, and whether the two are ``equal``.

    Raises:
        UserError: no data set, or the model has no recipe that says which pictures it was trained for.
    """
    heldout = load_captioned_images(data, "heldout", **pictures_of_model(Path(resolve_model(model))))
    heldout = heldout if pictures is None else heldout.spread(pictures)
    shown = heldout.pictures(range(len(heldout)))
    if pipe is None:
        pipe = LatteFlowPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
    backbone, processor = backbone_alone(model, pipe.backbone.dtype)
    alone = answers_about(backbone.to(pipe.device), processor, shown)
    pipe("", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    unified = answers_about(pipe.backbone, pipe.processor, shown)
    different = sum(one != other for name in alone for one, other in zip(alone[name], unified[name], strict=True))
    return {
        "pictures": len(shown),
        "questions": sum(len(answers) for answers in alone.values()),
        "backbone": shares_of(alone, heldout),
        "unified": shares_of(unified, heldout),
        "different_answers": different,
        "equal": different == 0,
    }
