"""A plan multiplies what is known and says what is assumed."""

from pathlib import Path

import pytest

from latteflow.errors import UserError
from latteflow.evaluate.plan import DEVICES, plan_of
from latteflow.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = RECIPES / "imagenet-256" / "generator.yaml"


@pytest.mark.parametrize(
    "recipe", ["imagenet-256/generator", "imagenet-256/vanilla", "text-to-image/256", "text-to-image/512"]
)
def test_every_large_recipe_has_a_plan(recipe):
    rows = plan_of(load_recipe(RECIPES / f"{recipe}.yaml")).rows()
    assert "assumed, not measured" in rows["days (estimate)"]
    assert "fits" in rows["memory a device"]


def test_the_papers_run_is_the_papers():
    plan = plan_of(load_recipe(PAPER))
    assert plan.samples == 240_000 * 2048
    assert plan.image_tokens == 64
    assert plan.parameters["backbone"] == 2_208_985_600
    # Seven layers of 46.8M, the rest modulation and what stands around them: the paper's "500M", nominally.
    assert 328e6 < plan.parameters["active"] < 350e6
    vanilla = plan_of(load_recipe(RECIPES / "imagenet-256" / "vanilla.yaml"))
    assert vanilla.flops_per_sample["replica"] == pytest.approx(4 * plan.flops_per_sample["replica"], rel=0.01)


def test_days_are_operations_over_rate():
    plan = plan_of(load_recipe(PAPER), device="a100-80gb", devices=16, mfu=0.5)
    seconds = plan.samples * sum(plan.flops_per_sample.values()) / (16 * 312e12 * 0.5)
    assert plan.days == pytest.approx(seconds / 86_400)
    assert plan.samples_per_device == 128


def test_latents_ahead_spare_the_autoencoder():
    plan = plan_of(load_recipe(PAPER, ["data.kind=latents"]))
    assert plan.flops_per_sample["autoencoder"] == 0


def test_what_spares_memory_spares_it_here():
    plain = plan_of(load_recipe(PAPER)).memory_bytes
    for change in (
        "train.strategy=fsdp2",
        "train.activation_checkpointing=true",
        "train.gradient_accumulation_steps=4",
    ):
        assert plan_of(load_recipe(PAPER, [change])).memory_bytes < plain
    lora = plan_of(load_recipe(PAPER, ["generator.lora.rank=16"]))
    assert lora.parameters["trainable"] < 0.05 * lora.parameters["replica"]
    assert lora.memory_bytes < plain


def test_checkpointing_costs_a_forward_pass():
    plain, again = (plan_of(load_recipe(PAPER, change)) for change in ([], ["train.activation_checkpointing=true"]))
    assert again.flops_per_sample["replica"] == pytest.approx(plain.flops_per_sample["replica"] * 4 / 3)


@pytest.mark.parametrize(
    ("overrides", "settings", "reason"),
    [
        ([], {"device": "abacus"}, f"no device 'abacus': there are {', '.join(DEVICES)}"),
        ([], {"devices": 3}, "batch_size 2048 does not divide among 3 devices"),
        (["generator.backbone=mine"], {}, "'mine' is none: qwen2-vl-2b"),
        (["generator.autoencoder=mine"], {}, "got 'mine'"),
        (["generator.num_groups=5"], {}, "num_groups has to divide the 28 layers: got 5"),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides, settings, reason):
    with pytest.raises(UserError, match=reason):
        plan_of(load_recipe(PAPER, overrides), **settings)
