"""Every family draws, and its understanding stays the backbone's, bit for bit."""

import copy

import numpy as np
import pytest
import torch

from families import MODEL_TYPES, shared_family, toy_family, toy_picture
from latteflow.flow.objective import layerwise_flow_loss
from latteflow.flow.path import interpolate, target_velocity
from latteflow.flow.schedulers import make_scheduler
from latteflow.pipeline import LatteFlowPipeline
from toys import seeded, toy_transformer, toy_vae


def pipeline_of(variant, **settings):
    backbone, processor = toy_family(variant)
    replica = toy_transformer(backbone, 2, **settings)
    pipe = LatteFlowPipeline(backbone, processor, replica, toy_vae(), make_scheduler("euler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def understood(backbone, processor, pictures):
    """The backbone's logits of a question, and its greedy answer."""
    prompt = processor.chat_prompt("What is this?", pictures=pictures)
    inputs = processor(prompt, [toy_picture(60, 30)] * pictures)
    with torch.no_grad():
        logits = backbone(**inputs).logits
        answer = backbone.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return logits, answer


def train(pipe, steps=2):
    """AdamW on the flow-matching loss of random latents, contexts computed on the way."""
    replica, generator = pipe.transformer, seeded(3)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-2)
    for _ in range(steps):
        context = pipe.encode_prompt(["a red circle", "no"])
        x_0, x_1 = torch.randn(2, 2, 4, 4, 4, generator=generator)
        t = torch.tensor([0.2, 0.7])  # both groups
        v = replica(interpolate(x_0, x_1, t), t, context)
        loss = layerwise_flow_loss(v, target_velocity(x_0, x_1), replica.group_of(t), 2).total
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in replica.parameters())
        optimizer.step()


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_understanding_is_the_backbones_before_and_after_training(variant):
    pipe = pipeline_of(variant)
    untouched = copy.deepcopy(pipe.backbone)
    expected = [understood(untouched, pipe.processor, pictures) for pictures in (0, 1)]
    (words, _), (seen, _) = expected
    assert not torch.allclose(words[0, -1], seen[0, -1], atol=1e-3)  # the picture matters

    started = copy.deepcopy(pipe.transformer.state_dict())
    for step in ("before", "after"):
        for pictures in (0, 1):
            logits, answer = understood(pipe.backbone, pipe.processor, pictures)
            assert torch.equal(logits, expected[pictures][0])
            assert torch.equal(answer, expected[pictures][1])
        if step == "before":
            train(pipe)
    assert all(not torch.equal(weight, started[name]) for name, weight in pipe.transformer.state_dict().items())
    for (name, mine), theirs in zip(pipe.backbone.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert mine.grad is None
    for mine, theirs in zip(pipe.backbone.buffers(), untouched.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_draws_pictures_of_the_size_asked(variant):
    pipe = pipeline_of(variant)
    for height, width in ((32, 32), (24, 48)):
        drawn = pipe(
            "a red circle", height=height, width=width, num_inference_steps=2, output_type="np", generator=seeded()
        ).images
        assert drawn.shape == (1, height, width, 3)
        assert np.isfinite(drawn).all()
        assert drawn.std() > 1e-3
    latents = [
        pipe(prompt, num_inference_steps=2, output_type="latent", generator=seeded()).images
        for prompt in ("a red circle", "the green square")
    ]
    assert not torch.allclose(*latents, atol=1e-3)


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_answers_about_what_it_has_drawn_as_the_backbone_does(variant):
    pipe = pipeline_of(variant)
    image = pipe("a red circle", num_inference_steps=2, generator=seeded()).images[0]
    inputs = pipe.processor(pipe.processor.chat_prompt("What is this?", pictures=1), [image])
    tokens = pipe.backbone.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = pipe.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert expected
    assert pipe.ask(image, "What is this?", max_new_tokens=6) == expected


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_a_saved_pipeline_is_the_same(variant, tmp_path):
    pipe = pipeline_of(variant, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0])
    pipe.save_pretrained(tmp_path)
    loaded = LatteFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for part in ("backbone", "transformer", "vae"):
        mine, theirs = getattr(pipe, part), getattr(loaded, part)
        assert type(mine) is type(theirs)
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        for name, weight in mine.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name]), name
    assert {**loaded.transformer.config}.items() >= {"num_groups": 2, "hidden_size": 48}.items()

    prompts = ["a red circle", "no"]
    drawn = [
        one(prompts, num_inference_steps=2, output_type="pil", generator=seeded()).images for one in (pipe, loaded)
    ]
    for mine, theirs in zip(*drawn, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))
    picture = toy_picture(60, 30)
    answers = [one.ask(picture, "What is this?", max_new_tokens=6) for one in (pipe, loaded)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_the_replica_of_a_half_precision_backbone_is_one(variant):
    backbone, _ = toy_family(variant)
    replica = toy_transformer(backbone.to(torch.bfloat16), 2, shaken=False)
    assert {parameter.dtype for parameter in replica.parameters()} == {torch.bfloat16}
    exact = toy_transformer(shared_family(variant)[0], 2, shaken=False)
    for (name, half), whole in zip(replica.named_parameters(), exact.parameters(), strict=True):
        if "layers" in name:
            torch.testing.assert_close(half.float(), whole, rtol=2**-7, atol=1e-6, msg=name)
