"""Trials: arms of a seed see the same, runs resume, and readings are what they say."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from latteflow.data.captioned import load_captioned_images
from latteflow.errors import UserError
from latteflow.evaluate.claim_plan import load_plan, recipe_of
from latteflow.evaluate.trial_feed import TrialFeed
from latteflow.evaluate.trials import TrialStage, run_trial
from latteflow.train.feeds import MemoryFeed
from latteflow.train.loop import Stopped
from latteflow.train.recipe import GeneratorRecipe, GeneratorSection
from latteflow.train.samples import step_samples
from toys import SIZE, toy_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="module")
def feed(toy_set, tmp_path_factory):
    images, heldout = (load_captioned_images(toy_set, split) for split in ("train", "heldout"))
    return TrialFeed(images, heldout, 2, "captions", tmp_path_factory.mktemp("feed") / "feed.safetensors")


def recipe(output, toy_set, parts, *, train=None, **generator):
    values = toy_recipe(
        "generator", output, toy_set, parts=parts, **{"preview_every": 2, "checkpoint_every": 2, **(train or {})}
    )
    values["train"]["steps"] = (train or {}).get("steps", 4)
    values["generator"] |= generator
    return GeneratorRecipe.model_validate(values)


def stage(feed, parts, seed=0, weights="backbone", **settings):
    section = {"autoencoder": f"{parts}/autoencoder", "backbone": f"{parts}/backbone", "time_embedding_size": 16}
    built = TrialStage(
        GeneratorSection.model_validate({**section, **settings}), feed, size=SIZE, seed=seed, weights=weights
    )
    built.to(torch.device("cpu"))
    return built


@pytest.mark.parametrize("groups", [1, 2])
def test_arms_see_the_same_samples_noise_and_times_whatever_k(feed, parts, groups):
    four, other = stage(feed, parts, num_groups=4), stage(feed, parts, num_groups=groups)
    for step in (0, 7):
        (samples,) = step_samples(step, number=feed.number, batch_size=12, seed=3)
        (their_groups, t), (own_groups, own_t) = four._times(samples), other._times(samples)
        torch.testing.assert_close(t, own_t, rtol=0, atol=3e-6)
        assert own_groups.tolist() == (their_groups // (4 // groups)).tolist()
        assert other.pipe.transformer.group_of(own_t).tolist() == own_groups.tolist()
        # Every four places hold each quarter of [0, 1] once.
        assert [sorted(some.tolist()) for some in (t * 4).long().split(4)] == [[0, 1, 2, 3]] * 3
    assert four.draws_sha256(12, 3) == other.draws_sha256(12, 3)
    assert four.draws_sha256(12, 3) != four.draws_sha256(12, 4)


def test_uneven_intervals_stretch_the_same_places(feed, parts):
    even, uneven = stage(feed, parts, num_groups=2), stage(feed, parts, num_groups=2, edges=[0, 0.2, 1])
    (samples,) = step_samples(0, number=feed.number, batch_size=8, seed=0)
    (groups, t), (own_groups, own_t) = even._times(samples), uneven._times(samples)
    assert groups.tolist() == own_groups.tolist()
    wanted = torch.where(t < 0.5, t * 0.4, 0.2 + (t - 0.5) * 1.6)
    torch.testing.assert_close(own_t, wanted, rtol=0, atol=3e-6)
    assert even.draws_sha256(8, 0) == uneven.draws_sha256(8, 0)


def test_what_is_not_copied_starts_alike_in_all_arms(feed, parts):
    def start(**settings):
        return stage(feed, parts, **settings).pipe.transformer.state_dict()

    four, one, drawn = start(num_groups=4), start(num_groups=1), start(num_groups=4, weights="random")
    others = start(num_groups=4, seed=1)
    for name in [name for name in four if ".gate." not in name]:
        assert torch.equal(four[name], one[name])
        copied = any(part in name for part in (".self_attn.", ".mlp.", "input_layernorm", "post_attention_layernorm"))
        assert torch.equal(four[name], drawn[name]) != copied
    assert any(not torch.equal(four[name], others[name]) for name in four if name.startswith("io.0.patch_embedding"))


def test_the_feed_is_the_loops_own_and_comes_back_from_its_file(toy_set, feed, parts, tmp_path):
    images, heldout = (load_captioned_images(toy_set, split) for split in ("train", "heldout"))
    memory = MemoryFeed(images, heldout, 2, 0)
    built, own = stage(feed, parts), stage(memory, parts)
    (samples,) = step_samples(0, number=feed.number, batch_size=8, seed=0)
    for there, here in zip(memory.inputs(samples, None, 0.5), built.feed.inputs(samples, None, 0.5), strict=True):
        if isinstance(there, torch.Tensor):
            torch.testing.assert_close(here, there)
        else:
            assert torch.equal(here.mask, there.mask)
            assert torch.equal(
                here.keys * here.mask[:, None, None, :, None], there.keys * there.mask[:, None, None, :, None]
            )
    assert own.pipe.transformer.config.latents_mean == built.pipe.transformer.config.latents_mean
    again = TrialFeed(images, heldout, 2, "captions", feed.cache)
    again._encode = again._contexts = None  # not to be called
    stage(again, parts)
    assert torch.equal(again.latents, feed.latents)
    names = TrialFeed(images, heldout, 2, "classes", feed.cache.with_name("classes"))
    stage(names, parts)
    assert len(names.contexts) == 1 + len({record.label for record in images.records})


def test_another_autoencoder_is_refused(feed, parts, tmp_path):
    stage(feed, parts)
    from toys import toy_vae

    toy_vae(seed=5).save_pretrained(tmp_path / "autoencoder")
    with pytest.raises(UserError, match="one autoencoder"):
        stage(feed, parts, autoencoder=str(tmp_path / "autoencoder"))


def test_a_reading_is_the_mean_of_its_parts_and_the_same_for_every_seed(feed, parts):
    one = stage(feed, parts, num_groups=2)
    found = one.readings()
    # At the start the velocity is zero and the loss is that of the target alone: the same in all arms.
    assert found == pytest.approx(stage(feed, parts, seed=4, num_groups=2).readings())
    assert found["loss"] == pytest.approx(stage(feed, parts, num_groups=1).readings()["loss"])
    assert set(found) >= {"loss", "seen", "loss/group-0", "loss/group-1"}


def test_an_interrupted_run_goes_on_to_the_same_readings(feed, toy_set, parts, tmp_path):
    _, straight = run_trial(recipe(tmp_path / "straight", toy_set, parts), feed, size=SIZE)

    def stop(progress):
        if progress.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run_trial(recipe(tmp_path / "broken", toy_set, parts), feed, size=SIZE, watch=stop)
    _, resumed = run_trial(recipe(tmp_path / "broken", toy_set, parts), feed, size=SIZE)
    for run in (straight, resumed):
        assert [row["step"] for row in run["curve"]] == [2, 4]
        first, last = (row.pop("processor_seconds") for row in run["curve"])
        assert 0 < first < last
    assert straight["curve"] == resumed["curve"]
    assert straight["other_prompts"] == resumed["other_prompts"]
    assert straight["curve"][1]["flops"] == 2 * straight["curve"][0]["flops"] == 4 * 6 * straight["flops_per_sample"]


def test_gates_are_told_where_their_layers_run(feed, parts):
    built = stage(feed, parts, num_groups=2)
    with torch.no_grad():
        built.pipe.transformer.layers[1].gate.project.bias.fill_(0.5)
    gates = built.gates()
    assert set(gates["layers"]) == {"1", "3"}  # the first layer of a group has no predecessor
    rows = gates["layers"]["1"]
    assert [row is not None for row in rows] == [t < 0.5 for t in gates["times"]]
    assert rows[0] == pytest.approx([0.4621, 0.4621])  # tanh(0.5)
    assert stage(feed, parts, num_groups=2, residual_attention="none").gates() is None


def test_readings_between_checkpoints_are_refused(feed, toy_set, parts, tmp_path):
    wrong = recipe(tmp_path, toy_set, parts, train={"preview_every": 3})
    with pytest.raises(UserError, match=r"multiple of train\.preview_every"):
        run_trial(wrong, feed, size=SIZE)


@pytest.mark.parametrize("case", ["emoji-64", "fashion-mnist"])
def test_every_plan_and_its_recipes_load(case, tmp_path):
    plan = load_plan(ROOT / "benchmarks" / "plans" / f"{case}.yaml")
    trials = list(plan.trials())
    assert len(trials) == len(set(trials))
    recipes = {trial: recipe_of(plan, *trial, tmp_path) for trial in trials}
    assert all(found.train.seed == seed for (_, seed), found in recipes.items())
    for claim in plan.claims:  # every claim can get a verdict
        assert len({s for a, s in trials if a == claim.better} & {s for a, s in trials if a == claim.than}) >= 3
    # An arm differs from the base in what it overrides alone.
    base = recipes[plan.base_arm, 0]
    assert recipes["k1", 0].generator == base.generator.model_copy(update={"num_groups": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claims": [{"line": "a", "says": "", "better": "k4", "than": "k5"}]}, "no arm 'k5'"),
        ({"seed": 3}, "Extra inputs"),
        ({"arms": {"k4": {"label": "", "weights": "none"}}}, "weights"),
    ],
)
def test_mistakes_in_a_plan_are_named(tmp_path, change, message):
    values = yaml.safe_load((ROOT / "benchmarks" / "plans" / "emoji-64.yaml").read_text())
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=message):
        load_plan(file)
    with pytest.raises(UserError, match="no plan"):
        load_plan(tmp_path / "other.yaml")
