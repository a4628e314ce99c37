"""The three stages on the toy set: they resume bit for bit, learn a batch by heart, export what the next loads."""

import shutil

import pytest
import torch
from diffusers import AutoencoderDC
from pydantic import TypeAdapter
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from latteflow.data import prompts
from latteflow.data.captioned import CaptionedImages, load_captioned_images
from latteflow.data.loader import generator_of
from latteflow.errors import UserError
from latteflow.flow.objective import layerwise_flow_loss
from latteflow.models.answers import greedy_answers
from latteflow.models.processor import LatteFlowProcessor
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.autoencoder import AutoencoderStage
from latteflow.train.backbone import BackboneStage
from latteflow.train.build import build_stage
from latteflow.train.checkpoint import checkpoint_folders
from latteflow.train.feeds import MemoryFeed
from latteflow.train.generator import GeneratorStage
from latteflow.train.loop import train
from latteflow.train.recipe import AutoencoderSection, BackboneSection, GeneratorSection, Recipe
from toys import samples_of, seeded, shake, toy_recipe

STAGES = ["autoencoder", "backbone", "generator"]


class Stopped(Exception):
    """Stands for the user's Ctrl-C."""


def stop_at_10(progress):
    if progress.step == 10:
        raise Stopped


def recipe_of(stage, output, toy_set, parts, **train_settings):
    return TypeAdapter(Recipe).validate_python(toy_recipe(stage, output, toy_set, parts=parts, **train_settings))


def weights(output):
    folder = checkpoint_folders(output)[-1]
    assert folder.name == "step-00000020"
    return {f"{part}/{name}": tensor for part in ("model", "ema")
            for name, tensor in load_file(folder / f"{part}.safetensors").items()}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_20_steps_are_10_and_10_resumed(stage, tmp_path, toy_set, parts):
    straight, resumed = (recipe_of(stage, tmp_path / name, toy_set, parts) for name in ("straight", "resumed"))
    train(straight, build_stage(straight))
    with pytest.raises(Stopped):
        train(resumed, build_stage(resumed), watch=stop_at_10)
    assert checkpoint_folders(tmp_path / "resumed")[-1].name == "step-00000010"
    assert not (tmp_path / "resumed" / "final").exists()
    train(resumed, build_stage(resumed))
    expected, found = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for file in (tmp_path / "straight" / "final").rglob("*.safetensors"):
        twin = tmp_path / "resumed" / "final" / file.relative_to(tmp_path / "straight" / "final")
        assert twin.read_bytes() == file.read_bytes()


def test_the_autoencoder_learns_a_batch_and_is_exported(tmp_path, toy_set):
    recipe = recipe_of("autoencoder", tmp_path, toy_set, None, steps=60, learning_rate=1e-2, ema_decay=0.5)
    stage = build_stage(recipe)
    assert stage.number == 36
    stage.images = one_of_each_colour(stage.images)
    stage.number = len(stage.images)
    first = stage.validate()["psnr"]
    seen = []
    final = train(recipe, stage, watch=seen.append)
    assert seen[-1].loss < 0.3 * seen[0].loss
    assert seen[-1].figures["validation/psnr"] > first + 2
    loaded = AutoencoderDC.from_pretrained(final)
    ema = load_file(checkpoint_folders(tmp_path)[-1] / "ema.safetensors")
    assert all(torch.equal(tensor, ema[name]) for name, tensor in loaded.state_dict().items())
    assert (tmp_path / "previews" / "step-00000060.png").is_file()


def one_of_each_colour(images, number=6):
    index = list(range(number))
    return CaptionedImages(images.pixels[index], images.records[:number])


def test_the_autoencoders_gradients_accumulate(tmp_path, toy_set):
    """On mirror images of themselves, so that the draws of mirrored pictures, one a part, change nothing."""
    steps = []
    for parts_of_a_batch in (1, 3):
        recipe = recipe_of("autoencoder", tmp_path / str(parts_of_a_batch), toy_set, None, steps=3, log_every=1,
                           gradient_accumulation_steps=parts_of_a_batch)  # fmt: skip
        stage = build_stage(recipe)
        pixels = torch.maximum(stage.images.pixels, stage.images.pixels.flip(-1))
        stage.images = CaptionedImages(pixels, stage.images.records)
        figures = []
        train(recipe, stage, watch=figures.append)
        steps.append((figures, stage.model.state_dict()))
    (whole, whole_weights), (pieces, pieces_weights) = steps
    for one, other in zip(whole, pieces, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.figures["gradient_norm"] == pytest.approx(other.figures["gradient_norm"], rel=1e-3)
    for name, tensor in whole_weights.items():
        torch.testing.assert_close(pieces_weights[name], tensor, rtol=0, atol=1e-4)


def test_the_autoencoders_options_change_its_loss(toy_set):
    images, heldout = (load_captioned_images(toy_set, split) for split in ("train", "heldout"))
    losses = {}
    for name, options in {"plain": {}, "edges": {"gradient_weight": 1.0}, "noise": {"latent_noise": 0.5}}.items():
        section = AutoencoderSection(latent_channels=4, widths=(8, 8, 16, 16), layers=(0, 1, 1, 1), **options)
        torch.manual_seed(0)
        stage = AutoencoderStage(section, images, heldout)
        shake(stage.model, seeded(), 0.02)
        loss, figures = stage.loss(stage.model, samples_of(torch.arange(6), 0), None)
        expected = figures["pixel"] + options.get("gradient_weight", 0.0) * figures["edge"]
        torch.testing.assert_close(loss.detach(), expected)
        losses[name] = loss.item()
    assert len(set(losses.values())) == 3


def test_the_backbone_learns_a_batch_by_heart_and_is_exported(tmp_path, toy_set):
    recipe = recipe_of("backbone", tmp_path, toy_set, None, steps=200, learning_rate=5e-3, ema_decay=0.5,
                       preview_every=200, checkpoint_every=200)  # fmt: skip
    images = load_captioned_images(toy_set, "train", styles=["solid"])
    images = CaptionedImages(images.pixels[:6], images.records[:6])
    once = {"augment": False, "text_share": 0.0, "turns": 1, "conversation_share": 1.0, "class_weight": 0.0}
    section = recipe.backbone.model_copy(update=once)
    torch.manual_seed(0)
    stage = BackboneStage(section, images, images)
    seen = []
    final = train(recipe, stage, watch=seen.append)
    assert seen[-1].figures["loss/words"] < 0.1
    assert seen[-1].figures["validation/concept"] == 1.0
    assert seen[-1].figures["validation/trained_concept"] == 1.0
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(final)
    processor = LatteFlowProcessor.from_pretrained(final)
    answers = greedy_answers(loaded, processor, images.pictures(range(6)), prompts.WHAT, max_new_tokens=16)
    assert answers == [record.label for record in images.records]
    assert len(set(answers)) > 3


def test_the_generator_learns_a_batch_and_draws(tmp_path, toy_set, parts):
    recipe = recipe_of("generator", tmp_path, toy_set, parts, steps=80, batch_size=24, learning_rate=1e-2,
                       ema_decay=0.5, preview_every=80, checkpoint_every=80)  # fmt: skip
    images = load_captioned_images(toy_set, "train", styles=["solid"])
    images = CaptionedImages(images.pixels[:3], images.records[:3])
    stage = GeneratorStage(recipe.generator, MemoryFeed(images, images, 2, 0), size=32, seed=0)
    stage.to(torch.device("cpu"))
    frozen = {name: tensor.clone() for name, tensor in (*stage.pipe.backbone.state_dict().items(),
                                                        *stage.pipe.vae.state_dict().items())}  # fmt: skip
    logits = logits_of(stage.pipe)
    before = fixed_loss(stage)
    final = train(recipe, stage)
    assert before > 1.5  # a fresh replica predicts velocity zero: noise and data both have spread 1
    assert fixed_loss(stage) < 0.4 * before

    for name, tensor in (*stage.pipe.backbone.state_dict().items(), *stage.pipe.vae.state_dict().items()):
        assert torch.equal(tensor, frozen[name])
    assert torch.equal(logits_of(stage.pipe), logits)

    pipe = LatteFlowPipeline.from_pretrained(final)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=4, generator=seeded()).images[0].size == (32, 32)
    ema = load_file(checkpoint_folders(tmp_path)[-1] / "ema.safetensors")
    assert all(torch.equal(tensor, ema[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert {file.name for file in final.iterdir()} > {"model_index.json", "transformer", "vae", "backbone"}


def fixed_loss(stage):
    """The loss of the same draws at every call."""
    index = torch.arange(3).repeat(40)
    with torch.no_grad():
        return stage.loss(stage.model, samples_of(index, 0), None)[0].item()


@torch.no_grad()
def logits_of(pipe):
    words = pipe.processor(["a red circle"], padding_side="right")
    return pipe.backbone(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).logits


@pytest.fixture
def generator_stage(tmp_path, toy_set, parts):
    stage = build_stage(recipe_of("generator", tmp_path, toy_set, parts))
    stage.to(torch.device("cpu"))
    return stage


def test_the_generator_reads_what_it_computed_ahead(generator_stage):
    stage = generator_stage
    assert stage.feed.latents.shape == (36, 4, 4, 4)
    torch.testing.assert_close(stage.feed.latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(stage.feed.latents.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)
    assert len(stage.feed.contexts) == 36 * 2 + 1
    for row in range(8, 12):
        record = stage.feed.images.records[row // 2]
        drawn = prompts.draw_caption(record, generator_of(0, "caption", row // 2, 1))
        alone = stage.pipe.encode_prompt([drawn if row % 2 else prompts.canonical_caption(record)])
        length = alone.mask.shape[1]
        assert int(stage.feed.contexts.next_position[row]) == length
        torch.testing.assert_close(
            stage.feed.contexts.keys[row, :, :, :length].float(), alone.keys[0], rtol=1e-2, atol=2e-2
        )  # kept in bfloat16
    assert int(stage.feed.contexts.next_position[-1]) == int(stage.pipe.encode_prompt([""]).next_position[0])


@pytest.mark.parametrize(("dropout", "own"), [(0.0, True), (1.0, False)])
def test_prompts_are_dropped_for_guidance(generator_stage, dropout, own):
    stage = generator_stage
    stage.settings = stage.settings.model_copy(update={"prompt_dropout": dropout})
    contexts = []

    def recorded(model, x_0, x_1, groups, t, context):
        contexts.append((x_1, context))
        return layerwise_flow_loss(x_0, x_1, groups, 2)

    stage._flow_loss = recorded
    index = torch.tensor([7, 0, 35])
    stage.loss(stage.model, samples_of(index, 0), None)
    x_1, context = contexts[0]
    assert torch.equal(x_1, stage.feed.latents[index])
    empty = int(stage.feed.contexts.next_position[-1])
    for row, i in enumerate(index.tolist()):
        candidates = stage.feed.contexts.next_position[2 * i : 2 * i + 2].tolist() if own else [empty]
        assert int(context.next_position[row]) in candidates
        assert (int(context.next_position[row]) == empty) == (not own)


def test_the_generators_loss_is_told_by_group_and_every_group_learns(generator_stage):
    stage = generator_stage
    shake(stage.model, seeded())
    loss, figures = stage.loss(stage.model, samples_of(torch.arange(8), 0), None)
    assert figures.keys() == {"loss/group-0", "loss/group-1"}
    assert loss.item() == pytest.approx(sum(float(part) for part in figures.values()) / 2, rel=1e-5)
    loss.backward()
    for layer in stage.model.layers:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert all(p.grad is None for p in stage.pipe.backbone.parameters())
    assert all(p.grad is None for p in stage.pipe.vae.parameters())


def test_a_picture_may_come_with_copies_that_are_moved_a_little(tmp_path, toy_set, parts):
    recipe = recipe_of("generator", tmp_path, toy_set, parts)
    own, moved = (
        build_stage(recipe.model_copy(update={"generator": recipe.generator.model_copy(update=update)}))
        for update in ({}, {"copies_per_image": 3})
    )
    for stage in (own, moved):
        stage.to(torch.device("cpu"))
    latents = moved.feed.latents.unflatten(0, (own.number, 3))
    assert torch.equal(latents[:, 0], own.feed.latents)
    apart = (latents[:, 1:] - latents[:, :1]).square().mean()
    elsewhere = (latents[:, 1:] - latents[:, :1].roll(1, 0)).square().mean()
    assert 0 < apart < elsewhere
    assert not torch.equal(latents[:, 1], latents[:, 2])
    x_1, _ = moved.feed.inputs(samples_of(torch.full((40,), 5), 0), None, 0.0)
    places = [next(copy for copy in range(3) if torch.equal(row, latents[5, copy])) for row in x_1]
    assert set(places) == {0, 1, 2}


def test_one_factor_may_scale_all_channels(tmp_path, toy_set, parts):
    recipe = recipe_of("generator", tmp_path, toy_set, parts)
    each = build_stage(recipe).model.config.latents_std
    common = recipe.model_copy(update={"generator": recipe.generator.model_copy(update={"latent_scale": "common"})})
    stage = build_stage(common)
    stage.to(torch.device("cpu"))
    assert len(set(each)) == len(each)
    assert len(set(stage.model.config.latents_std)) == 1
    assert stage.feed.latents.var(dim=(0, 2, 3)).mean().item() == pytest.approx(1, abs=0.05)


def test_experts_times_narrow_from_noise_to_their_intervals(generator_stage, monkeypatch):
    stage = generator_stage
    stage.settings = stage.settings.model_copy(update={"narrowing_steps": 100})
    index = torch.zeros(400, dtype=torch.int64)

    def times(step):
        found = stage.describe(samples_of(index, step=step))
        return [[t for t, group in zip(found["t"], found["group"], strict=True) if group == k] for k in (0, 1)]

    for step, begins in ((0, 0.0), (50, 0.25), (99, 0.495), (100, 0.5), (101, 0.5)):
        first, second = times(step)
        assert 0 <= min(first) < 0.02
        assert 0.48 < max(first) < 0.5
        assert begins <= min(second) < begins + 0.02
        assert 0.98 < max(second) <= 1
    asked = []

    def recorded(self, group, x_t, t, context, cache=None):
        asked.append((group, float(t.min())))
        return x_t

    monkeypatch.setattr(type(stage.pipe.transformer), "expert", recorded)
    stage.loss(stage.model, samples_of(index, 0), None)
    assert [group for group, _ in asked] == [0, 1]  # the expert is the drawn one, whatever t is
    assert all(t < 0.02 for _, t in asked)


def test_validation_says_the_same_twice_and_leaves_no_trace(generator_stage):
    stage = generator_stage
    shake(stage.model, seeded())
    state = torch.get_rng_state()
    with torch.no_grad():
        assert stage.validate() == stage.validate()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("groups", [1, 2])
def test_previews_use_steps_that_every_group_shares(generator_stage, monkeypatch, groups):
    stage = generator_stage
    stage.settings = stage.settings.model_copy(update={"num_groups": groups})
    steps = []
    call = type(stage.pipe).__call__

    def recorded(pipe, *given, num_inference_steps, **settings):
        steps.append(num_inference_steps)
        return call(pipe, *given, num_inference_steps=groups, **settings)

    monkeypatch.setattr(type(stage.pipe), "__call__", recorded)
    assert stage.preview().size[1] == 32
    assert steps == [20]
    stage.settings = stage.settings.model_copy(update={"num_groups": 28})
    stage.preview()
    assert steps[1] == 28


@pytest.mark.parametrize("part", ["autoencoder", "backbone"])
def test_a_frozen_part_that_is_not_there_is_named(tmp_path, toy_set, parts, part):
    shutil.copytree(parts, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / part)
    with pytest.raises(UserError, match=f"no {part} in .*{part}: train one with `latteflow train"):
        build_stage(recipe_of("generator", tmp_path, toy_set, tmp_path / "parts"))


@pytest.mark.parametrize("part", ["autoencoder", "backbone"])
def test_a_frozen_part_that_is_truncated_is_named(tmp_path, toy_set, parts, part):
    shutil.copytree(parts, tmp_path / "parts")
    file = next((tmp_path / "parts" / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{part} .*cannot be loaded"):
        build_stage(recipe_of("generator", tmp_path, toy_set, tmp_path / "parts"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "num_groups has to divide the 4 layers: got 3"),
        ({"edges": (0.0, 0.2)}, "interval edges"),
    ],
)
def test_a_generator_that_cannot_be_built_is_refused(tmp_path, toy_set, parts, change, message):
    section = GeneratorSection(autoencoder=f"{parts}/autoencoder", backbone=f"{parts}/backbone", **change)
    images = load_captioned_images(toy_set, "heldout")
    with pytest.raises(UserError, match=message):
        GeneratorStage(section, MemoryFeed(images, images, 2, 0), size=32, seed=0)


def backbone_stage(toy_set, **changes):
    """The stage with a backbone whose weights are away from their start."""
    images = load_captioned_images(toy_set, "train")
    section = BackboneSection(**{**toy_recipe("backbone", toy_set, toy_set)["backbone"], **changes})
    torch.manual_seed(0)
    stage = BackboneStage(section, images, images)
    shake(stage.model, seeded(), 0.05)
    return stage


@pytest.mark.parametrize("text_share", [0.0, 0.5, 1.0])
def test_the_backbones_word_loss_is_transformers_own(toy_set, text_share):
    """The conversations that the stage makes, handed to the model's own ``forward`` with labels."""
    stage = backbone_stage(toy_set, text_share=text_share, conversation_share=1.0, turns=3)
    handed = {}

    def recorded(pixel_values, grid, shown, ids, labels):
        handed.update(pixel_values=pixel_values, grid=grid, shown=shown, ids=ids, labels=labels)
        return stage.model(pixel_values, grid, shown, ids, labels)

    _, figures = stage.loss(recorded, samples_of(torch.arange(8), 0), None)
    shown = handed["shown"]
    assert len(shown) in {0.0: (8,), 0.5: range(2, 7), 1.0: (0,)}[text_share]
    ids = handed["ids"]
    pictures = {}
    if len(shown):
        patches = handed["pixel_values"].unflatten(0, (8, 16))[shown].flatten(0, 1)
        pictures = {"pixel_values": patches, "image_grid_thw": handed["grid"][shown]}
    output = stage.backbone(
        input_ids=ids,
        attention_mask=(ids != stage.tokenizer.pad_token_id).long(),
        mm_token_type_ids=(ids == stage.backbone.config.image_token_id).long(),
        labels=handed["labels"],
        **pictures,
    )
    torch.testing.assert_close(figures["loss/words"], output.loss.detach(), rtol=1e-5, atol=1e-5)


def test_the_backbones_loss_is_its_words_and_its_classes(toy_set):
    stage = backbone_stage(toy_set, text_share=0.5, class_weight=0.3)
    loss, figures = stage.loss(stage.model, samples_of(torch.arange(12), 0), None)
    classes = [figures[f"loss/{key}"] for key in ("concept", "style", "group")]
    torch.testing.assert_close(loss.detach(), figures["loss/words"] + 0.3 * sum(classes))
    loss.backward()
    assert all(p.grad is not None for p in stage.model.parameters())
    assert torch.equal(stage.loss(stage.model, samples_of(torch.arange(12), 0), None)[0], loss)
    assert not torch.equal(stage.loss(stage.model, samples_of(torch.arange(12), 1), None)[0], loss)


def test_the_exported_backbone_has_no_heads(toy_set, tmp_path):
    stage = backbone_stage(toy_set)
    stage.export(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "heads" in name]


def test_the_seed_decides_the_first_weights(tmp_path, toy_set):
    first, same, other = (
        build_stage(recipe_of("autoencoder", tmp_path, toy_set, None, seed=seed)).model.state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())
