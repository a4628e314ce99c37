"""The judge and the teacher: what is frozen, where concepts start, what is counted, what is saved."""

import pytest
import torch
from pydantic import TypeAdapter

from latteflow.data.captioned import load_captioned_images
from latteflow.errors import UserError
from latteflow.train.build import build_stage
from latteflow.train.classifier import (
    PictureClassifier,
    among_styles,
    class_numbers,
    classes_of,
    classified,
    hit_shares,
    load_classifier,
)
from latteflow.train.loop import train
from latteflow.train.recipe import Recipe
from toys import samples_of, toy_recipe

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(scope="module")
def images(toy_set):
    return load_captioned_images(toy_set, "train")


@pytest.fixture(scope="module")
def classifier(images):
    made = PictureClassifier(classes_of(images.records), picture_size=64)
    made.start_from(images)
    return made


def test_it_starts_from_the_mean_of_each_concepts_pictures(classifier, images):
    """Not from what the concepts' vectors were: on toys, they tell most training pictures at once."""
    wanted = class_numbers(images.records, classifier.classes)
    assert hit_shares(classified(classifier, images.pixels), wanted)["concept"] > 0.8
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as the features were standardised
        scores, cells = classifier(images.batch(torch.arange(len(images))))
    assert cells.shape == (len(images), 4, 1280)
    torch.testing.assert_close(cells.mean((0, 1)), torch.zeros(1280), atol=0.1, rtol=0)
    torch.testing.assert_close(classifier.concept_scores(cells.mean(dim=1)), scores["concept"])
    assert classifier.concepts.norm(dim=1).sub(1).abs().max() < 1e-4


def test_it_never_takes_statistics_of_a_batch(images):
    """Not even before the loop has switched it to evaluation and back."""
    made = PictureClassifier(classes_of(images.records), picture_size=64)
    assert not any(module.training for module in made.modules())
    made.train()
    assert not any(module.training for module in made.modules())


def test_styles_are_learnt_at_the_start_and_stay(classifier, images):
    wanted = class_numbers(images.records, classifier.classes)
    assert hit_shares(classified(classifier, images.pixels), wanted)["style"] > 0.9
    assert not any(p.requires_grad for p in classifier.styles.parameters())


def test_only_styles_that_are_asked_about_can_be_the_best():
    scores = {"style": torch.tensor([[5.0, 1, 2], [5, 2, 1]]), "concept": torch.zeros(2, 2)}
    found = among_styles(scores, {"style": ["a", "b", "c"]}, {"b", "c"})
    assert found["style"].argmax(dim=1).tolist() == [2, 1]
    assert found["concept"] is scores["concept"]
    assert scores["style"].argmax(dim=1).tolist() == [0, 0]


def test_only_later_blocks_and_heads_learn_and_statistics_stay(classifier, images):
    classifier.zero_grad()
    state = {name: tensor.clone() for name, tensor in classifier.named_buffers()}
    classifier.train()
    scores, _ = classifier(images.batch(torch.arange(6)))
    torch.stack([part.square().mean() for part in scores.values()]).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in classifier.stem.parameters())
    learning = [*classifier.blocks.parameters(), *classifier.top.parameters(), classifier.concepts]
    assert all(p.grad is not None for p in learning)
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.named_buffers())


def test_a_loaded_classifier_computes_the_same_with_its_statistics_multiplied_in(classifier, images, tmp_path):
    classifier.save(tmp_path)
    loaded = load_classifier(tmp_path, what="teacher")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in loaded.modules())
    with torch.no_grad():
        (expected, cells), (found, its_cells) = (made(images.batch(torch.arange(8))) for made in (classifier, loaded))
        scores, alone, textures = loaded.opinion(images.batch(torch.arange(8)))
    torch.testing.assert_close(its_cells, cells, rtol=1e-3, atol=1e-3)
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-3, atol=1e-2)
    assert torch.equal(alone, its_cells)
    torch.testing.assert_close(found["style"], loaded.styles(textures))
    assert torch.equal(scores, found["concept"])


def test_it_can_be_made_to_forget_concepts(classifier, images, tmp_path):
    classifier.save(tmp_path)
    loaded = load_classifier(tmp_path, what="teacher")
    batch = images.batch(torch.arange(8))
    with torch.no_grad():
        before = loaded(batch)[0]["concept"]
        every = loaded.classes["concept"]
        loaded.forget_concepts([every[5], every[2]])
        torch.testing.assert_close(loaded(batch)[0]["concept"], before[:, [5, 2]])
    with pytest.raises(UserError, match="knows no 'ffff'"):
        loaded.forget_concepts(["ffff"])


def test_hits_are_counted_by_rank():
    scores = {
        "concept": torch.tensor([[9.0, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4], [0, 0, 0, 0, 0, 1]]),
        "style": torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0]]),
        "group": torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]]),
    }
    wanted = {"concept": torch.tensor([0, 1, 5, 5]), "style": torch.zeros(4), "group": torch.tensor([1, 1, 1, 0])}
    assert hit_shares(scores, wanted) == {"concept": 0.5, "concept_top5": 0.75, "style": 1.0, "category": 0.5}


def recipe_of(output, toy_set, **train_settings):
    plain = toy_recipe("backbone", output, toy_set, **train_settings)
    section = {"picture_size": 64, "blend_share": 0.5}
    return TypeAdapter(Recipe).validate_python(
        {"stage": "classifier", "classifier": section, **{key: plain[key] for key in ("output", "data", "train")}}
    )


def test_training_lowers_its_loss_and_the_export_loads(tmp_path, toy_set):
    recipe = recipe_of(tmp_path, toy_set, steps=12, batch_size=12, preview_every=12, checkpoint_every=12, ema_decay=0.5,
                       learning_rate=3e-4)  # fmt: skip
    stage = build_stage(recipe)

    def fixed_loss():
        with torch.no_grad():
            return stage.loss(stage.model, samples_of(torch.arange(36)), None)[0].item()

    before = fixed_loss()
    seen = []
    final = train(recipe, stage, watch=seen.append)
    assert fixed_loss() < before - 0.2
    assert {f"validation/{key}" for key in ("concept", "concept_top5", "style", "category", "trained_concept")} <= set(
        seen[-1].figures
    )
    heldout = load_captioned_images(toy_set, "heldout")
    loaded = load_classifier(final, what="judge")
    shares = hit_shares(classified(loaded, heldout.pixels), class_numbers(heldout.records, loaded.classes))
    assert shares["concept"] == pytest.approx(seen[-1].figures["validation/concept"])
    assert not any(p.requires_grad for p in loaded.parameters())


def test_blended_pictures_count_for_both(tmp_path, toy_set):
    stage = build_stage(recipe_of(tmp_path, toy_set))
    seen = []

    def perfect_for_own(pictures):
        """Scores that are sure of each picture's own classes."""
        seen.append(pictures)
        index = torch.arange(36)
        return {
            key: 100 * torch.nn.functional.one_hot(stage.wanted[key][index], len(stage.classifier.classes[key])).float()
            for key in stage.wanted
        }, None

    losses = {}
    for share in (0.0, 1.0):
        stage.settings = stage.settings.model_copy(update={"blend_share": share})
        losses[share] = stage.loss(perfect_for_own, samples_of(torch.arange(36)), None)[0].item()
    assert losses[1.0] > 2 * losses[0.0]


def test_a_missing_judge_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"no judge in .*: train one with `latteflow train recipes/emoji-64/judge"):
        load_classifier(tmp_path, what="judge")
