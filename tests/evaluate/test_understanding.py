"""The frozen backbone through our classes, and through transformers alone: the same words and the same bits.

The other way round is written out here: the prompt's text, what stands in it for a picture, the pixels, the greedy
loop. It uses nothing of latteflow.
"""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

import toys
from latteflow.data.captioned import load_captioned_images
from latteflow.errors import UserError
from latteflow.evaluate import understanding
from latteflow.evaluate.understanding import FrozenBackbone, heldout_understanding, sampling_of, user_turn
from latteflow.pipeline import LatteFlowPipeline

PICTURE = toys.toy_picture("circle", "red", "solid")
QUESTION = "What is this?"


class Bare:
    """transformers' own classes on the backbone's files."""

    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(folder / "backbone", dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "processor")
        kept = json.loads((folder / "processor" / "processor_config.json").read_text())["image_processor"]
        names = ("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
        self.images = Qwen2VLImageProcessorPil(**{name: kept[name] for name in names})
        self.template = (folder / "processor" / "chat_template.jinja").read_text()

    def inputs(self, pictures, question, answer=""):
        parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}],
            chat_template=self.template or self.tokenizer.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        vision = self.images(images=pictures, return_tensors="pt") if pictures else {}
        for grid in vision.get("image_grid_thw", []):
            count = int(grid.prod()) // 4
            text = text.replace("<|image_pad|>", "<|picture|>" * count, 1)
        ids = self.tokenizer(text.replace("<|picture|>", "<|image_pad|>") + answer, return_tensors="pt")["input_ids"]
        kinds = (ids == self.model.config.image_token_id).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **vision}

    @torch.no_grad()
    def logits(self, pictures, question, answer="", *, last=1):
        """Scores of the last tokens: how many are asked for decides which matrix product the library takes."""
        inputs = self.inputs(pictures, question, answer)
        return self.model(**inputs, use_cache=False, logits_to_keep=last).logits[0]

    @torch.no_grad()
    def greedy(self, pictures, question, tokens):
        inputs = self.inputs(pictures, question)
        found = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return self.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def bare(saved_pipeline):
    return Bare(saved_pipeline)


@pytest.fixture(scope="module", params=["unified", "alone"])
def frozen(request, saved_pipeline):
    return FrozenBackbone.of_model(str(saved_pipeline), alone=request.param == "alone", device="cpu")


CASES = [
    ([PICTURE], QUESTION),
    ([], "Describe this picture."),
    ([PICTURE, toys.toy_picture("cross", "blue", "tiny")], "Which style is this?"),
]


@pytest.mark.parametrize(("pictures", "question"), CASES)
def test_words_are_those_of_the_bare_backbone(frozen, bare, pictures, question):
    answer = frozen.answer(user_turn(pictures, question), max_new_tokens=12)
    assert answer == bare.greedy(pictures, question, 12)
    assert answer


@pytest.mark.parametrize(("pictures", "question"), CASES)
def test_scores_are_those_of_the_bare_backbone_bit_for_bit(frozen, bare, pictures, question):
    answer = "a red circle"
    scores, words = frozen.scores(user_turn(pictures, question), answer)
    assert torch.equal(scores, bare.logits(pictures, question, answer, last=len(words) + 1))
    assert frozen.processor.tokenizer.decode(words).strip() == answer
    following, none = frozen.scores(user_turn(pictures, question))
    assert torch.equal(following, bare.logits(pictures, question))
    assert len(none) == 0


def test_drawing_changes_no_bit(saved_pipeline, bare):
    pipe = LatteFlowPipeline.from_pretrained(str(saved_pipeline))
    pipe.set_progress_bar_config(disable=True)
    asked = FrozenBackbone(pipe.backbone, pipe.processor)
    pipe(["a red square", "a blue triangle"], num_inference_steps=4, generator=toys.seeded())
    pipe.chat([{"role": "user", "content": QUESTION}], max_new_tokens=3)
    scores, _ = asked.scores(user_turn([PICTURE], QUESTION))
    assert torch.equal(scores, bare.logits([PICTURE], QUESTION))


def test_loss_is_the_mean_over_the_words_of_the_answer(frozen, bare):
    turn = user_turn([PICTURE], QUESTION)
    loss, greedy = frozen.loss(turn, " a red circle ")
    words = bare.tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    logits = bare.logits([PICTURE], QUESTION, "a red circle", last=len(words) + 1)
    found = [logits[i].log_softmax(-1)[word].item() for i, word in enumerate(words)]
    assert loss == pytest.approx(-sum(found) / len(words), rel=1e-5)
    assert not greedy


@pytest.mark.parametrize(("best", "greedy"), [([3, 1, 2], True), ([3, 1, 0], False), ([0, 1, 2], False)])
def test_an_answer_is_greedy_if_each_of_its_words_is_the_best(frozen, monkeypatch, best, greedy):
    scores = torch.full((4, 5), -1.0)
    scores[range(3), best] = 2.0
    monkeypatch.setattr(frozen, "scores", lambda messages, answer: (scores, torch.tensor([3, 1, 2])))
    assert frozen.loss(user_turn([], QUESTION), "three words here")[1] is greedy


def test_an_empty_answer_is_refused(frozen):
    with pytest.raises(UserError, match="empty answer"):
        frozen.loss(user_turn([], "yes?"), "  ")


def test_transparent_pictures_are_seen_on_white(frozen):
    clear = Image.new("RGBA", PICTURE.size, (0, 0, 0, 0))
    white = Image.new("RGB", PICTURE.size, "white")
    scores = [frozen.scores(user_turn([picture], QUESTION))[0] for picture in (clear, white)]
    assert torch.equal(*scores)


def test_a_dtype_is_a_known_one(saved_pipeline):
    with pytest.raises(UserError, match="no dtype 'int4'"):
        FrozenBackbone.of_model(str(saved_pipeline), dtype="int4")
    half = FrozenBackbone.of_model(str(saved_pipeline), dtype="bfloat16", device="cpu")
    assert half.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, {}),
        ({"temperature": 0, "do_sample": True, "top_p": 0.5, "until": ["x"]}, {}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7, "top_p": None}),
        ({"temperature": 0.7, "do_sample": False}, {}),
        ({"num_beams": 3}, {"num_beams": 3}),
        ({"num_beams": 1, "temperature": None}, {}),
    ],
)
def test_settings_of_a_harness_are_greedy_without_a_temperature(given, taken):
    assert sampling_of(given) == taken


@pytest.fixture
def model_folder(saved_pipeline, tmp_path):
    copied = tmp_path / "copy"
    copied.mkdir()
    for part in saved_pipeline.iterdir():
        (copied / part.name).symlink_to(part)
    data = {"leave_out_groups": [], "leave_out_subgroups": [], "styles": [], "skin_tones": ["none"]}
    (copied / "recipe.json").write_text(json.dumps({"data": data}))
    return copied


def test_the_held_out_questions_are_answered_alike(toy_set, model_folder):
    report = heldout_understanding(str(model_folder), toy_set)
    heldout = load_captioned_images(toy_set, "heldout", skin_tones=["none"])
    assert (report["pictures"], report["questions"]) == (len(heldout), 3 * len(heldout))
    assert (report["different_answers"], report["equal"]) == (0, True)
    assert report["backbone"] == report["unified"]
    assert report["backbone"].keys() == {"concept", "style", "category"}
    assert heldout_understanding(str(model_folder), toy_set, pictures=2)["pictures"] == 2


def test_another_backbone_shows(toy_set, model_folder, monkeypatch):
    whole = understanding.backbone_alone

    def changed(model, dtype):
        backbone, processor = whole(model, dtype)
        return toys.shake(backbone, toys.seeded(5), 0.5), processor

    monkeypatch.setattr(understanding, "backbone_alone", changed)
    report = heldout_understanding(str(model_folder), toy_set)
    assert report["different_answers"] > 0
    assert not report["equal"]
