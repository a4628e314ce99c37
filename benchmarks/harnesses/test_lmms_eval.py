"""The model class against lmms-eval itself: found by name, and a task of each kind from its YAML file to the scores.

The pictures are drawn by the embedded model, so nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model, get_model_manifest
from lmms_eval.tasks import TaskManager

from latteflow import LatteFlowPipeline
from latteflow.evaluate.understanding import FrozenBackbone, user_turn

THINGS = ("red heart", "pizza", "grinning face", "evergreen tree")
STYLES = ("noto", "twemoji", "openmoji", "fluent 3d")
COMMON = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_visual: !function pictures.pictures
doc_to_target: style
metadata:
  version: 1.0
"""
TASKS = {
    "emoji_words": """\
task: emoji_words
output_type: generate_until
doc_to_text: question
generation_kwargs:
  max_new_tokens: 16
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
""",
    "emoji_rounds": """\
task: emoji_rounds
output_type: generate_until_multi_round
doc_to_text: !function pictures.rounds
process_results: !function pictures.both_right
generation_kwargs:
  max_new_tokens: 16
metric_list:
  - metric: both
    aggregation: mean
    higher_is_better: true
""",
}
FUNCTIONS = """\
def pictures(doc):
    return [doc["image"].convert("RGB")]


def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return "What is this?"
    return pictures(doc), doc["question"], round_idx == 2, previous_output, None


def both_right(doc, results):
    [answers] = results
    assert len(answers) == 2, results
    return {"both": float(answers[1].lower() == doc["style"])}
"""


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """A drawing of each thing in a style of its own, with a question about it."""
    pipe = LatteFlowPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    captions = [f"{thing}, {style} style" for thing, style in zip(THINGS, STYLES, strict=True)]
    drawn = pipe(captions, num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images
    return [
        {"image": picture, "question": "Which style is this?", "style": style}
        for picture, style in zip(drawn, STYLES, strict=True)
    ]


@pytest.fixture(scope="module")
def tasks(documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files, as ``--include_path`` takes it."""
    folder = tmp_path_factory.mktemp("tasks")
    write_parquet(documents, folder / "test.parquet")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text + COMMON.format(file=folder / "test.parquet"))
    (folder / "pictures.py").write_text(FUNCTIONS)
    return folder


def write_parquet(documents: list[dict[str, Any]], file: Path) -> None:
    """Write documents as the ``datasets`` library writes pictures."""
    kinds = {"image": Image(), "question": Value("string"), "style": Value("string")}
    Dataset.from_list(documents, features=Features(kinds)).to_parquet(str(file))


def scores(tasks: Path, model_args: str) -> dict[str, Any]:
    """Run the harness as its command does."""
    found = evaluator.simple_evaluate(
        model="latteflow",
        model_args=model_args,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False, model_name="latteflow"),
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
    )
    return {name: found["results"][name] for name in TASKS} | {"samples": found["samples"]}


def test_it_is_found_by_its_name() -> None:
    """By the entry point of the installed package."""
    assert get_model_manifest("latteflow").simple_class_path == "latteflow.evaluate.lmms_eval.LatteFlow"
    found = get_model("latteflow")
    assert issubclass(found, lmms)
    assert not found.__abstractmethods__


def test_the_unified_model_scores_what_its_backbone_does(tasks: Path, documents: list[dict[str, Any]]) -> None:
    """A task of each kind that generates, end to end: both give the answers that the bare backbone gives."""
    unified, alone = (scores(tasks, f"pretrained=emoji-64{more}") for more in ("", ",alone=True"))
    for name in TASKS:
        assert unified[name] == alone[name], name
    bare = FrozenBackbone.of_model("emoji-64", alone=True, device="cpu")
    turns = [user_turn([document["image"]], document["question"]) for document in documents]
    words = [bare.answer(turn, max_new_tokens=16) for turn in turns]
    said = [sample["resps"][0][0] for sample in unified["samples"]["emoji_words"]]
    assert said == words
    right = sum(one == document["style"] for one, document in zip(words, documents, strict=True)) / len(words)
    assert unified["emoji_words"]["exact_match,none"] == pytest.approx(right)


def test_likelihoods_are_the_backbone_s(documents: list[dict[str, Any]]) -> None:
    """Called as the harness calls it.

    Not through its evaluator: version 0.7.3 turns every answer that is no text into text, so that tasks which choose by
    likelihood stop in it, whatever the model.
    """
    model = get_model("latteflow").create_from_arg_string("pretrained=emoji-64", {"batch_size": 1, "device": "cpu"})
    model.task_dict["styles"] = {"test": documents}
    facts = {"task": "styles", "doc_id": 0, "repeats": 1}
    requests = [
        Instance(
            request_type="loglikelihood",
            arguments=(document["question"], f" {style}", lambda doc: [doc["image"]], number, "styles", "test"),
            idx=0,
            metadata=facts,
        )
        for number, document in enumerate(documents)
        for style in STYLES
    ]
    bare = FrozenBackbone.of_model("emoji-64", alone=True, device="cpu")
    turns = [user_turn([document["image"]], document["question"]) for document in documents]
    assert model.loglikelihood(requests) == [bare.loss(turn, style) for turn in turns for style in STYLES]
