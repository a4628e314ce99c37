"""The model classes for lmms-eval and VLMEvalKit, against stand-ins with the abstract interface of each.

The real harnesses have packages that clash with ours: `make test-harnesses` tests against them in an environment of
their own (benchmarks/harnesses). The stand-ins below are what we use of lmms-eval 0.7.3 and VLMEvalKit 0.2.
"""

from __future__ import annotations

import abc
import importlib
import importlib.metadata
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import toys
from latteflow.errors import UserError
from latteflow.evaluate import lmms_eval, vlmevalkit
from latteflow.evaluate.understanding import FrozenBackbone, user_turn

PICTURES = [toys.toy_picture("circle", "red", "solid"), toys.toy_picture("square", "blue", "outline")]


class lmms(abc.ABC):
    """What lmms_eval.api.model.lmms asks of a model."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: None)
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, words, more=None):
        given = dict(pair.split("=", 1) for pair in words.split(","))
        return cls(**given, **{key: value for key, value in (more or {}).items() if value is not None})


class BaseModel:
    """What vlmeval.vlm.base.BaseModel does around a model."""

    INTERLEAVE = False

    def __init__(self):
        self.dump_image_func = None

    @abc.abstractmethod
    def generate_inner(self, message, dataset=None): ...

    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


def modules(names: dict[str, dict[str, Any]]) -> dict[str, ModuleType]:
    found = {}
    for name, held in names.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(held)
    return found


@pytest.fixture(autouse=True)
def harnesses(monkeypatch):
    """Both stand-ins, as if installed."""
    table = {}
    names = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "vlmeval": {},
        "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
        "vlmeval.config": {"supported_VLM": table},
    }
    for name, module in modules(names).items():
        monkeypatch.setitem(sys.modules, name, module)
    for module in (lmms_eval, vlmevalkit):
        module._model_class.cache_clear()
    yield table
    for module in (lmms_eval, vlmevalkit):
        module._model_class.cache_clear()


@pytest.fixture
def frozen(saved_pipeline):
    return FrozenBackbone.of_model(str(saved_pipeline), alone=True, device="cpu")


@pytest.fixture
def model(saved_pipeline):
    """As lmms-eval makes it from its command line, with a task of two documents."""
    given = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    made = lmms_eval.LatteFlow.create_from_arg_string(f"pretrained={saved_pipeline}", given)
    made.task_dict["shapes"] = {"test": [{"image": picture} for picture in PICTURES]}
    return made


def request(*arguments):
    return SimpleNamespace(args=arguments)


def shown(document):
    return [document["image"]]


def test_lmms_eval_finds_the_model_by_its_entry_point():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    group = project.split('[project.entry-points."lmms_eval.models"]')[1].split("[")[0]
    entry = importlib.metadata.EntryPoint("latteflow", re.search('latteflow = "(.*)"', group)[1], "lmms_eval.models")
    manifest = entry.load()()
    assert manifest == ModelManifest("latteflow", "latteflow.evaluate.lmms_eval.LatteFlow")
    module, name = manifest.simple_class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, lmms)
    assert found.is_simple
    assert not found.__abstractmethods__


def test_lmms_eval_answers_are_the_backbone_s(model, frozen):
    asked = [
        request("<image>What is this?", {"max_new_tokens": 9, "until": ["\n\n"]}, shown, i, "shapes", "test")
        for i in (1, 0)
    ]
    wanted = [frozen.answer(user_turn([PICTURES[i]], "What is this?"), max_new_tokens=9) for i in (1, 0)]
    assert model.generate_until(asked) == wanted
    assert wanted[0] != wanted[1]
    assert model.device.type == "cpu"


def test_lmms_eval_documents_may_show_nothing_or_much(model, frozen):
    for pictures, shape in (([], None), (PICTURES, [PICTURES]), (PICTURES[:1], PICTURES[0])):
        asked = request("yes or no?", {"max_new_tokens": 5}, lambda _, shape=shape: shape, 0, "shapes", "test")
        assert model.generate_until([asked]) == [frozen.answer(user_turn(pictures, "yes or no?"), max_new_tokens=5)]
    film = request("What happens?", {}, lambda _: ["film.mp4"], 0, "shapes", "test")
    with pytest.raises(UserError, match="task shapes shows a str: only pictures"):
        model.generate_until([film])


@pytest.mark.parametrize(("until", "left"), [([], "a b\nc b"), (["\n"], "a b"), ("b", "a"), (["", "c", "\n"], "a b")])
def test_lmms_eval_answers_end_where_the_task_says(model, monkeypatch, until, left):
    monkeypatch.setattr(FrozenBackbone, "answer", lambda *given, **settings: "a b\nc b")
    asked = request("What is this?", {"until": until}, shown, 0, "shapes", "test")
    assert model.generate_until([asked]) == [left]


def test_lmms_eval_settings_reach_the_backbone(model, monkeypatch):
    given = []
    monkeypatch.setattr(FrozenBackbone, "answer", lambda self, messages, **settings: given.append(settings) or "")
    for settings in ({}, {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9}):
        model.generate_until([request("What?", settings, shown, 0, "shapes", "test")])
    assert given == [
        {"max_new_tokens": 128},
        {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_p": 0.9},
    ]


def test_lmms_eval_rounds_go_on_until_the_task_ends_them(model, frozen):
    asked = []

    def words_of(document, previous_output, round_idx, previous_round_info):
        asked.append((list(previous_output), round_idx, previous_round_info))
        return [PICTURES[1]], f"And now, {round_idx}?", round_idx == 2, previous_output, f"info {round_idx}"

    settings = {"max_new_tokens": 5}
    [answers] = model.generate_until_multi_round([request("First?", settings, shown, words_of, 0, "shapes", "test")])
    wanted = [
        frozen.answer(user_turn([PICTURES[0]], "First?"), max_new_tokens=5),
        frozen.answer(user_turn([PICTURES[1]], "And now, 1?"), max_new_tokens=5),
    ]
    assert answers == wanted
    assert asked == [(wanted[:1], 1, None), (wanted, 2, "info 1")]


def test_lmms_eval_losses_are_lower_the_likelier(model, frozen):
    choices = [" red circle", " blue square"]
    asked = [request("What is this?", choice, shown, 0, "shapes", "test") for choice in choices]
    asked.append(request("What is this?", lambda document: "red circle", shown, 0, "shapes", "test"))
    found = model.loglikelihood(asked)
    assert found[:2] == [frozen.loss(user_turn([PICTURES[0]], "What is this?"), choice) for choice in choices]
    assert found[2] == found[0]
    assert found[0][0] != found[1][0]
    assert found[0][0] > 0


def test_lmms_eval_batches_are_refused(saved_pipeline):
    with pytest.raises(UserError, match="batch_size has to be 1"):
        lmms_eval.LatteFlow(pretrained=str(saved_pipeline), batch_size="8")


def test_vlmevalkit_takes_the_model_from_its_table(harnesses, saved_pipeline):
    vlmevalkit.register(str(saved_pipeline), "toy", device="cpu", max_new_tokens=6)
    made = harnesses["toy"]()
    assert isinstance(made, BaseModel)
    assert made.INTERLEAVE
    assert made.dump_image_func is None
    assert made._settings == {"max_new_tokens": 6}
    vlmevalkit.register("emoji-64")
    assert set(harnesses) == {"toy", "emoji-64"}


def test_vlmevalkit_answers_are_the_backbone_s(saved_pipeline, frozen, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, picture in zip(files, PICTURES, strict=True):
        picture.save(file)
    made = vlmevalkit.LatteFlow(str(saved_pipeline), device="cpu", max_new_tokens=8)
    parts = [
        {"type": "image", "value": str(files[0])},
        {"type": "text", "value": "and"},
        {"type": "image", "value": str(files[1])},
        {"type": "text", "value": "What is this?"},
    ]
    content = [
        {"type": "image", "image": PICTURES[0]},
        {"type": "text", "text": "and"},
        {"type": "image", "image": PICTURES[1]},
        {"type": "text", "text": "What is this?"},
    ]
    first = frozen.answer([{"role": "user", "content": content}], max_new_tokens=8)
    assert made.generate(parts, dataset="Shapes") == first
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "value": "no"}]},
        {"role": "user", "content": [{"type": "text", "value": "yes"}]},
    ]
    told = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "yes"},
    ]
    assert made.chat_inner(turns) == frozen.answer(told, max_new_tokens=8)


def test_vlmevalkit_parts_that_are_no_pictures_are_refused(saved_pipeline, tmp_path):
    made = vlmevalkit.LatteFlow(str(saved_pipeline), device="cpu")
    with pytest.raises(UserError, match="got 'video'"):
        made.generate([{"type": "video", "value": "film.mp4"}])
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name in ("a.png", "b.png"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture"):
            made.generate([{"type": "image", "value": str(tmp_path / name)}])


@pytest.mark.parametrize(("module", "missing"), [(lmms_eval, "lmms_eval"), (vlmevalkit, "vlmeval")])
def test_a_harness_that_is_not_there_is_said_so(monkeypatch, module, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=f"no {missing}.*environment of its own"):
        _ = module.LatteFlow


@pytest.mark.parametrize("module", [lmms_eval, vlmevalkit])
def test_other_names_are_not_there(module):
    with pytest.raises(AttributeError, match="LatteFlo'"):
        _ = module.LatteFlo


def test_pictures_of_any_mode_are_taken(model):
    faint = Image.new("LA", (32, 32), (0, 0))
    asked = request("What is this?", {"max_new_tokens": 3}, lambda _: [faint], 0, "shapes", "test")
    assert len(model.generate_until([asked])) == 1
