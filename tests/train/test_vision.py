"""The vision tower trained alone: its forward is transformers' own, its losses are what they say, it is handed on."""

from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import functional

from latteflow.data.captioned import load_captioned_images
from latteflow.data.prompts import WHAT, Turn
from latteflow.data.transforms import patches_of
from latteflow.errors import UserError
from latteflow.train.backbone import BackboneStage
from latteflow.train.build import build_stage, load_others
from latteflow.train.classifier import KEYS, PictureClassifier, classes_of
from latteflow.train.loop import train
from latteflow.train.recipe import BackboneSection, DataSection, Recipe
from latteflow.train.vision import Guess, answerable, load_vision, picture_tokens, teaching_loss, unlike_any
from toys import PATCH, samples_of, seeded, toy_recipe

pytest.importorskip("efficientnet_lite_pytorch")

SIZES = {
    "hidden_size": 32,
    "num_heads": 2,
    "vision_depth": 2,
    "vision_width": 32,
    "vision_heads": 2,
    "patch_size": PATCH,
}


@pytest.fixture(scope="module")
def teacher(toy_set, tmp_path_factory):
    """Folder of a teacher of the toy set that was not trained: 2 x 2 cells, as many as the tower's tokens."""
    images = load_captioned_images(toy_set, "train")
    classifier = PictureClassifier(classes_of(images.records), picture_size=64)
    classifier.start_from(images)
    folder = tmp_path_factory.mktemp("teacher")
    classifier.save(folder)
    return folder


def recipe_of(output, toy_set, teacher, section=None, **train_settings):
    plain = toy_recipe("backbone", output, toy_set, **train_settings)
    vision = {"teacher": str(teacher), **SIZES, **(section or {})}
    return TypeAdapter(Recipe).validate_python(
        {"stage": "vision", "vision": vision, **{key: plain[key] for key in ("output", "data", "train")}}
    )


def test_the_batched_forward_is_transformers_own(backbone):
    pictures = torch.rand(5, 3, 32, 32, generator=seeded()) * 2 - 1
    patches, grid = patches_of(pictures, patch_size=PATCH)
    with torch.no_grad():
        expected = torch.stack(list(backbone.model.get_image_features(patches, grid).pooler_output))
        found = picture_tokens(backbone.model.visual, patches, grid)
    assert found.shape == (5, 4, 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_so_are_its_gradients(backbone):
    visual = backbone.model.visual
    patches, grid = patches_of(torch.rand(3, 3, 32, 48, generator=seeded()) * 2 - 1, patch_size=PATCH)
    patches.requires_grad_()
    own = torch.autograd.grad(picture_tokens(visual, patches, grid).square().sum(), patches)[0]
    tokens = torch.stack(list(backbone.model.get_image_features(patches, grid).pooler_output))
    torch.testing.assert_close(own, torch.autograd.grad(tokens.square().sum(), patches)[0], rtol=1e-4, atol=1e-5)


class Teacher:
    """Three concepts, four cells; the last layer reads the first three features."""

    def __init__(self, number):
        self.target = torch.randn(number, 4, 1280, generator=seeded())
        self.texture = torch.randn(number, 5, generator=seeded(3))
        self.seen = Guess(self.target, self.texture)

    def opinion(self, pictures):
        return self.concept_scores(self.target.mean(dim=1)), self.target, self.texture

    def concept_scores(self, top):
        return 3 * top[:, :3]


def test_a_pupil_that_gives_the_teachers_features_and_scores_has_only_labels_to_learn():
    teacher = Teacher(6)
    scores = {key: teacher.concept_scores(teacher.target.mean(dim=1)) for key in KEYS}
    none = dict.fromkeys(KEYS, torch.full((6,), -100))
    total, parts = teaching_loss(teacher, torch.zeros(6), scores, teacher.seen, none)
    assert parts.keys() == {"loss/features", "loss/texture", "loss/opinion"}
    torch.testing.assert_close(total, torch.tensor(0.0), atol=1e-6, rtol=0)

    some = {**none, "style": torch.tensor([0, -100, 2, -100, -100, 1])}
    total, parts = teaching_loss(teacher, torch.zeros(6), scores, teacher.seen, some)
    expected = functional.cross_entropy(scores["style"][[0, 2, 5]], torch.tensor([0, 2, 1]), label_smoothing=0.1)
    torch.testing.assert_close(total, 2 * expected)
    torch.testing.assert_close(parts["loss/style"], 2 * expected)


def test_features_and_opinion_are_squared_error_and_divergence():
    teacher = Teacher(6)
    scores = {key: torch.randn(6, 3, generator=seeded(1)) for key in KEYS}
    none = dict.fromkeys(KEYS, torch.full((6,), -100))
    _, parts = teaching_loss(teacher, torch.zeros(6), scores, Guess(teacher.target + 2.0, teacher.texture - 3.0), none)
    torch.testing.assert_close(parts["loss/features"], torch.tensor(4.0))
    torch.testing.assert_close(parts["loss/texture"], torch.tensor(9.0))
    wanted = teacher.concept_scores(teacher.target.mean(dim=1)).softmax(dim=1)
    log_ratio = wanted.log() - scores["concept"].log_softmax(dim=1)
    # Adding 2 to every feature adds 6 to every score of the last layer, which leaves its opinion alone.
    torch.testing.assert_close(parts["loss/opinion"], (wanted * log_ratio).sum(dim=1).mean())


def test_the_teachers_last_layer_reads_the_towers_features():
    teacher = Teacher(6)
    right = teacher.concept_scores(teacher.target.mean(dim=1))
    none = dict.fromkeys(KEYS, torch.full((6,), -100))
    shifted = teacher.target + torch.tensor([1.0, 0, 0] + [0] * 1277)
    _, parts = teaching_loss(teacher, torch.zeros(6), dict.fromkeys(KEYS, right), Guess(shifted, teacher.texture), none)
    read = (right + torch.tensor([3.0, 0, 0])).log_softmax(dim=1)
    expected = (right.softmax(dim=1) * (right.log_softmax(dim=1) - read)).sum(dim=1).mean()
    torch.testing.assert_close(parts["loss/opinion"], expected)


def test_a_teacher_of_another_grid_is_refused():
    none = dict.fromkeys(KEYS, torch.full((6,), -100))
    scores = {key: torch.zeros(6, 3) for key in KEYS}
    with pytest.raises(UserError, match="the tower has 16 tokens a picture, the teacher 4 cells"):
        teaching_loss(Teacher(6), torch.zeros(6), scores, Guess(torch.zeros(6, 16, 1280), torch.zeros(6, 5)), none)


def test_pictures_are_told_apart_from_blends():
    pictures = torch.rand(64, 3, 32, 32, generator=seeded()) * 2 - 1
    changed, whole, mild = unlike_any(pictures, seeded(1), mild_share=0.25, blend_share=0.5)
    assert 10 < whole.sum() < 54
    assert 4 < mild.sum() < 32
    assert whole[mild].all()
    values = {round(float(value), 5) for value in pictures.unique()} | {1.0}
    keeps_values = [{round(float(value), 5) for value in picture.unique()} <= values for picture in changed]
    assert keeps_values == mild.tolist()
    assert torch.equal(unlike_any(pictures, seeded(1), mild_share=0.25, blend_share=0.5)[0], changed)
    _, whole, mild = unlike_any(pictures, seeded(1), mild_share=1.0, blend_share=1.0)
    assert whole.all()
    assert mild.all()
    _, whole, mild = unlike_any(pictures, seeded(1), mild_share=0.0, blend_share=1.0)
    assert not whole.any()
    assert not mild.any()


def test_labels_go_with_labelled_whole_pictures_only(tmp_path, toy_set, teacher, monkeypatch):
    shares = {"others_share": 0.25, "blend_share": 0.5, "mild_share": 0.25}
    stage = build_stage(recipe_of(tmp_path, toy_set, teacher, shares))
    extra = torch.arange(36) % 5 == 0
    stage.images = replace(
        stage.images,
        records=tuple(replace(record, extra=bool(x)) for record, x in zip(stage.images.records, extra, strict=True)),
    )
    stage.wanted = answerable(stage.images.records, stage.classes)
    handed = {}

    def recorded(teacher, pictures, scores, cells, wanted):
        handed.update(wanted)
        return torch.tensor(0.0), {}

    monkeypatch.setattr("latteflow.train.vision.teaching_loss", recorded)
    index = torch.arange(36)
    stage.loss(stage.model, samples_of(index), None)
    ignored = handed["concept"] == -100
    assert ignored[:9].all()
    assert 5 < ignored[9:].sum() < 22
    assert torch.equal(handed["group"] == -100, ignored)
    unstyled = handed["style"] == -100
    assert unstyled[9:][ignored[9:]].all()  # what is not one thing has no style
    assert unstyled[9:][extra[9:]].all()
    assert 1 <= (~unstyled[9:]).sum() < (~ignored[9:]).sum() - extra[9:].sum() // 2  # nor have distorted pictures
    for key in KEYS:
        known = handed[key][9:] != -100
        assert torch.equal(handed[key][9:][known], stage.wanted[key][9:][known])
    assert (stage.wanted["concept"] >= 0).all()  # the stage's own labels are as they were
    assert torch.equal(stage.wanted["style"] == -100, extra)


def test_other_pictures_have_their_style_for_a_label(tmp_path, toy_set, teacher, monkeypatch):
    stage = build_stage(recipe_of(tmp_path, toy_set, teacher, {"others_share": 1.0, "mild_share": 1.0}))
    assert torch.equal(stage.other_styles, stage.wanted["style"])  # here the others are the same pictures
    stage.other_styles[::2] = -100  # as if in extra styles
    handed, shown = {}, []

    def recorded(teacher, pictures, scores, cells, wanted):
        handed.update(wanted)
        return torch.tensor(0.0), {}

    monkeypatch.setattr("latteflow.train.vision.teaching_loss", recorded)
    monkeypatch.setattr(
        type(stage.others), "batch", lambda self, index: shown.append(index) or torch.zeros(len(index), 3, 32, 32)
    )
    stage.loss(stage.model, samples_of(torch.arange(36)), None)
    assert torch.equal(handed["style"], stage.other_styles[shown[1]])
    assert (handed["concept"] == -100).all()
    assert (handed["group"] == -100).all()


def test_other_pictures_are_all_of_the_training_set(toy_set):
    data = DataSection(path=str(toy_set), styles=("tiny",), skin_tones=("none",))
    assert len(load_others(data)) == 36


def test_it_trains_and_hands_its_tower_to_the_backbone(tmp_path, toy_set, teacher):
    recipe = recipe_of(tmp_path / "vision", toy_set, teacher, steps=30, batch_size=12, ema_decay=0.5, optimizer="muon")
    pupil, seen = build_stage(recipe), []

    def fixed_loss():
        with torch.no_grad():
            return pupil.loss(pupil.model, samples_of(torch.arange(36)), None)[0].item()

    before = fixed_loss()
    final = train(recipe, pupil, watch=seen.append)
    assert fixed_loss() < before - 0.5
    assert 0 <= seen[-1].figures["validation/concept"] <= 1

    images = load_captioned_images(toy_set, "train")
    plain = toy_recipe("backbone", tmp_path, toy_set)["backbone"]
    section = BackboneSection(**{**plain, "vision_depth": 2, "vision": str(final), "teacher": str(teacher)})
    stage = BackboneStage(section, images, images)
    vision = build_stage(recipe)
    pictures, grid = patches_of(images.batch(torch.arange(4)), patch_size=PATCH)
    with torch.no_grad():
        before = picture_tokens(stage.backbone.model.visual, pictures, grid)
        assert not torch.allclose(before, picture_tokens(vision.visual, pictures, grid))
        load_vision(final, vision.model)
        torch.testing.assert_close(before, picture_tokens(vision.visual, pictures, grid))
    _, figures = stage.loss(stage.model, samples_of(torch.arange(12)), None)
    assert {"loss/words", "loss/features", "loss/opinion", "loss/concept"} <= figures.keys()

    untaught = BackboneStage(section.model_copy(update={"teacher": None}), images, images)
    with torch.no_grad():
        torch.testing.assert_close(picture_tokens(untaught.backbone.model.visual, pictures, grid), before)
    other = section.model_copy(update={"vision_width": 16})
    with pytest.raises(UserError, match="does not fit this recipe"):
        BackboneStage(other, images, images)
    with pytest.raises(UserError, match=r"no vision tower in .*: train one with"):
        BackboneStage(section.model_copy(update={"vision": str(tmp_path)}), images, images)


def test_only_a_picture_that_shows_its_style_is_asked_for_it(tmp_path, toy_set, teacher, monkeypatch):
    images = load_captioned_images(toy_set, "train")
    plain = toy_recipe("backbone", tmp_path, toy_set)["backbone"]
    section = BackboneSection(**{**plain, "teacher": str(teacher), "mild_share": 0.5, "conversation_share": 1.0})
    stage = BackboneStage(section.model_copy(update={"text_share": 0.0}), images, images)
    extra = torch.arange(36) % 3 == 0
    records = [replace(record, extra=bool(x)) for record, x in zip(images.records, extra, strict=True)]
    stage.images = replace(images, records=tuple(records))
    stage.wanted = answerable(stage.images.records, stage.classes)
    asked, handed = [], {}

    def turns(record, number, labels, generator, *, styled):
        asked.append(styled)
        return [Turn(WHAT, record.label)]

    def losses(teacher, pictures, scores, cells, wanted):
        handed.update(wanted)
        return torch.tensor(0.0), {}

    monkeypatch.setattr("latteflow.data.prompts.draw_turns", turns)
    monkeypatch.setattr("latteflow.train.backbone.teaching_loss", losses)
    with torch.no_grad():
        stage.loss(stage.model, samples_of(torch.arange(36)), None)
    styled = torch.tensor(asked)
    assert not styled[extra].any()
    assert 4 < styled.sum() < 20
    assert torch.equal(handed["style"] != -100, styled)
    assert (handed["concept"] != -100).all()  # what is talked about is one thing
