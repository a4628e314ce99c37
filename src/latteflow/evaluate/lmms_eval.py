"""A latteflow model for lmms-eval, which finds it by the name ``latteflow`` once both are installed.

    lmms-eval --model latteflow --model_args pretrained=emoji-64 --tasks pope,mmbench_en_dev

``manifest`` is the entry point (group ``lmms_eval.models``); ``LatteFlow`` is the class that the harness asks for. It
is made when it is asked for, so that this module can be imported without the harness.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import count
from typing import Any

from latteflow.errors import UserError

_NEW_TOKENS = 128
"""Where a task does not say: what the harness's own Qwen2-VL takes."""
_INSTALL = "lmms-eval is not complete ({}): pip install lmms-eval, in an environment of its own (docs/evaluation.md)"


class LmmsEvalAnswers:
    """The methods of a model as lmms-eval calls them; ``LatteFlow`` joins them with the harness's base class.

    Pictures stand before the words of a question, and marks for them inside the words (``<image>``) are left out, as
    the harness's own class for Qwen2-VL does. The chat template is the backbone's own.

    Args:
        pretrained: an embedded model's name, a folder, or a model of the hub.
        alone: score the backbone from its own files, without the rest of the model, to compare with.
        device: left out, cuda where there is one, else cpu.
        dtype: float32, bfloat16 or float16.
        batch_size: 1: see ``understanding.py``.
        max_batch_size: given by the harness, not used.

    Raises:
        UserError: another batch size, or a model that cannot be loaded.
    """

    is_simple = True
    task_dict: dict[str, Any]
    cache_hook: Any

    def __init__(
        self,
        pretrained: str = "emoji-64",
        alone: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        from latteflow.evaluate.understanding import FrozenBackbone

        super().__init__()
        if str(batch_size) != "1":
            raise UserError(f"batch_size has to be 1, so that padding changes no score: got {batch_size}")
        self._frozen = FrozenBackbone.of_model(pretrained, alone=alone, device=device, dtype=dtype)

    @property
    def device(self) -> Any:
        """Where the backbone is."""
        return self._frozen.backbone.device

    def generate_until(self, requests: Iterable[Any]) -> list[str]:
        """Return an answer to each request (words, settings, pictures of a document, its number, task, split).

        Raises:
            UserError: a document shows something else than pictures.
        """
        answers = []
        for request in requests:
            words, settings, pictures_of, number, task, split = request.args
            pictures = _pictures(pictures_of(self.task_dict[task][split][number]), task)
            answers.append(self._answer(words, pictures, settings))
            self.cache_hook.add_partial("generate_until", (words, settings), answers[-1])
        return answers

    def generate_until_multi_round(self, requests: Iterable[Any]) -> list[list[str]]:
        """Return the answers of all rounds of each request; the task makes the next round of those so far.

        Raises:
            UserError: a document shows something else than pictures.
        """
        found = []
        for request in requests:
            words, settings, pictures_of, words_of, number, task, split = request.args
            document = self.task_dict[task][split][number]
            pictures, answers, known = pictures_of(document), [], None
            for turn in count(1):
                answers.append(self._answer(words, _pictures(pictures, task), settings))
                pictures, words, over, answers, known = words_of(
                    document, previous_output=answers, round_idx=turn, previous_round_info=known
                )
                answers = list(answers)
                if over:
                    break
            found.append(answers)
            self.cache_hook.add_partial("generate_until_multi_round", (request.args[0], settings), answers)
        return found

    def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
        """Return for each request how unlikely its answer is, and whether it is the greedy one.

        The figure is the mean cross entropy a token, the lower the likelier: the harness takes the choice with the
        lowest, whatever the method's name says.

        Raises:
            UserError: an empty answer, or a document that shows something else than pictures.
        """
        found = []
        for request in requests:
            words, answer, pictures_of, number, task, split = request.args
            document = self.task_dict[task][split][number]
            answer = answer if isinstance(answer, str) else answer(document)
            found.append(self._frozen.loss(_turn(words, _pictures(pictures_of(document), task)), answer))
        return found

    def _answer(self, words: str, pictures: list[Any], settings: Mapping[str, Any]) -> str:
        from latteflow.evaluate.understanding import sampling_of

        length = settings.get("max_new_tokens") or _NEW_TOKENS
        answer = self._frozen.answer(_turn(words, pictures), max_new_tokens=length, **sampling_of(settings))
        ends = settings.get("until") or []
        for end in [ends] if isinstance(ends, str) else ends:
            if end:
                answer = answer.split(end)[0]
        return answer.strip()


def _turn(words: str, pictures: list[Any]) -> Any:
    from latteflow.evaluate.understanding import user_turn

    return user_turn(pictures, words.replace("<image>", ""))


def _pictures(shown: Any, task: str) -> list[Any]:
    from PIL import Image

    flat: list[Any] = []
    for one in [] if shown is None else shown if isinstance(shown, list | tuple) else [shown]:
        flat += one if isinstance(one, list | tuple) else [one]
    for one in flat:
        if not isinstance(one, Image.Image):
            raise UserError(
                f"task {task} shows a {type(one).__name__}: only pictures are understood, no video or sound"
            )
    return flat


@cache
def _model_class() -> type:
    try:
        from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise UserError(_INSTALL.format(f"no {error.name}")) from error
    own = {"__module__": __name__, "__doc__": "A latteflow model for lmms-eval; see ``LmmsEvalAnswers``."}
    return type("LatteFlow", (LmmsEvalAnswers, lmms), own)


def manifest() -> Any:
    """Return what lmms-eval's registry wants to know: the entry point of the group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    return ModelManifest(model_id="latteflow", simple_class_path=f"{__name__}.LatteFlow")


def __getattr__(name: str) -> Any:
    if name == "LatteFlow":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
