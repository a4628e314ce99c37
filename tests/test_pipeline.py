"""The pipeline: prompts to pictures and questions to answers, as users of diffusers expect of a call."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latteflow.errors import UserError
from latteflow.flow.schedulers import SCHEDULERS, make_scheduler, schedule_times, set_schedule
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.pipeline import LatteFlowPipeline
from toys import PATCH, seeded, toy_picture, toy_pipeline

PROMPTS = ["a red circle", "an emoji of a green square drawn in outline style"]


@pytest.fixture
def pipe():
    return toy_pipeline()


def draw(pipe, prompt="a red circle", **settings):
    settings = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent", **settings}
    return pipe(prompt, **settings).images


def expert_calls(pipe, monkeypatch):
    """A list that fills with (group, batch size) of each call of an expert."""
    calls, expert = [], pipe.transformer.expert

    def recorded(group, x_t, t, context, cache=None):
        calls.append((group, len(x_t)))
        return expert(group, x_t, t, context, cache)

    monkeypatch.setattr(pipe.transformer, "expert", recorded)
    return calls


def backbone_calls(pipe):
    calls = []
    pipe.backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return calls


# ---- calls and routing


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_steps_are_network_calls(monkeypatch, name, steps):
    pipe = toy_pipeline(scheduler=name)
    calls = expert_calls(pipe, monkeypatch)
    draw(pipe, num_inference_steps=steps)
    assert len(calls) == (2 * steps - 1 if name == "heun" else steps)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_each_call_goes_to_the_expert_of_its_time(monkeypatch, name, groups):
    pipe = toy_pipeline(groups, scheduler=name)
    calls = expert_calls(pipe, monkeypatch)
    draw(pipe, num_inference_steps=8)
    scheduler = make_scheduler(name)
    set_schedule(scheduler, 8)
    expected = [pipe.transformer.intervals.group_of(t) for t in schedule_times(scheduler)]
    found = [group for group, _ in calls]
    assert found == expected
    assert found == sorted(found)
    assert set(found) == set(range(groups))
    if name != "heun":
        assert [found.count(group) for group in range(groups)] == [8 // groups] * groups


def test_uneven_intervals_route_by_their_edges(monkeypatch):
    pipe = toy_pipeline(2, intervals=[0.0, 0.25, 1.0])
    calls = expert_calls(pipe, monkeypatch)
    draw(pipe, num_inference_steps=8)
    assert [group for group, _ in calls] == [0, 0] + [1] * 6


def test_a_schedulers_shift_is_followed(monkeypatch):
    pipe = toy_pipeline(2)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    calls = expert_calls(pipe, monkeypatch)
    draw(pipe, num_inference_steps=8)
    assert [group for group, _ in calls].count(0) == 6  # t = 0.5 comes at 3/4 of the steps


# ---- guidance


def test_scale_1_is_the_conditional_model_at_half_the_work(pipe, monkeypatch):
    calls = expert_calls(pipe, monkeypatch)
    plain = draw(pipe, guidance_scale=1.0)
    assert {size for _, size in calls} == {1}
    calls.clear()
    draw(pipe, guidance_scale=1.001)
    assert {size for _, size in calls} == {2}

    x_t = torch.randn(1, 4, 4, 4, generator=seeded())
    context = pipe.encode_prompt(["a red circle"])
    for step in range(4):
        x_t = x_t + pipe.transformer(x_t, torch.tensor([step / 4]), context).detach() / 4
    torch.testing.assert_close(plain, x_t, rtol=0, atol=1e-5)


def test_guidance_is_the_formula(pipe):
    x_t = torch.randn(1, 4, 4, 4, generator=seeded())
    with_prompt, without = pipe.encode_prompt(["a red circle"]), pipe.encode_prompt([""])
    for step in range(4):
        t = torch.tensor([step / 4])
        v, v_without = pipe.transformer(x_t, t, with_prompt), pipe.transformer(x_t, t, without)
        x_t = (x_t + (v_without + 3.0 * (v - v_without)) / 4).detach()
    torch.testing.assert_close(draw(pipe, guidance_scale=3.0), x_t, rtol=0, atol=1e-4)
    assert not torch.allclose(draw(pipe, guidance_scale=1.0), x_t, atol=1e-2)


def test_guidance_acts_in_its_interval_only(pipe, monkeypatch):
    calls = expert_calls(pipe, monkeypatch)
    guided, plain = draw(pipe, guidance_scale=3.0), draw(pipe, guidance_scale=1.0)
    assert torch.equal(draw(pipe, guidance_scale=3.0, guidance_interval=(0.0, 0.75)), guided)
    torch.testing.assert_close(draw(pipe, guidance_scale=3.0, guidance_interval=(0.9, 1.0)), plain, rtol=0, atol=1e-5)
    calls.clear()
    draw(pipe, guidance_scale=3.0, guidance_interval=(0.25, 0.5))
    assert [size for _, size in calls] == [1, 2, 2, 1]

    x_t = torch.randn(1, 4, 4, 4, generator=seeded())
    with_prompt, without = pipe.encode_prompt(["a red circle"]), pipe.encode_prompt([""])
    for step in range(4):
        t = torch.tensor([step / 4])
        v = pipe.transformer(x_t, t, with_prompt)
        if step in (1, 2):
            v_without = pipe.transformer(x_t, t, without)
            v = v_without + 3.0 * (v - v_without)
        x_t = (x_t + v / 4).detach()
    found = draw(pipe, guidance_scale=3.0, guidance_interval=(0.25, 0.5))
    torch.testing.assert_close(found, x_t, rtol=0, atol=1e-4)


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.5,), (float("nan"), 1.0)])
def test_a_guidance_interval_that_is_none_is_refused(pipe, interval):
    with pytest.raises(UserError, match="guidance_interval has to be two times"):
        draw(pipe, guidance_interval=interval)


def test_scale_0_ignores_the_prompt(pipe):
    one, other = draw(pipe, PROMPTS[0], guidance_scale=0.0), draw(pipe, PROMPTS[1], guidance_scale=0.0)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    torch.testing.assert_close(one, draw(pipe, "", guidance_scale=1.0), rtol=0, atol=1e-5)


def test_the_prompt_matters(pipe):
    assert not torch.allclose(draw(pipe, PROMPTS[0]), draw(pipe, PROMPTS[1]), atol=1e-2)


def test_a_negative_prompt_stands_in_for_the_empty_one(pipe):
    plain = draw(pipe)
    assert torch.equal(draw(pipe, negative_prompt=""), plain)
    assert torch.equal(draw(pipe, negative_prompt=[""]), plain)
    away = draw(pipe, negative_prompt="a blue triangle")
    assert not torch.allclose(away, plain, atol=1e-3)
    # Steering away from the prompt itself leaves the conditional velocity.
    same = draw(pipe, negative_prompt="a red circle")
    torch.testing.assert_close(same, draw(pipe, guidance_scale=1.0), rtol=0, atol=1e-4)


def test_negative_prompts_one_for_all_or_one_each(pipe):
    shared = draw(pipe, PROMPTS, negative_prompt="no")
    torch.testing.assert_close(draw(pipe, PROMPTS, negative_prompt=["no", "no"]), shared, rtol=0, atol=1e-5)
    each = draw(pipe, PROMPTS, negative_prompt=["no", ""])
    torch.testing.assert_close(each[:1], shared[:1], rtol=0, atol=1e-5)
    assert not torch.allclose(each[1:], shared[1:], atol=1e-3)
    with pytest.raises(UserError, match="3 negative prompts for 2 prompts"):
        draw(pipe, PROMPTS, negative_prompt=["no"] * 3)


# ---- a picture does not depend on its batch


def test_picture_i_is_the_seed_plus_i_alone(pipe):
    together = draw(pipe, num_images_per_prompt=3, generator=seeded(5))
    for i in range(3):
        alone = draw(pipe, generator=seeded(5 + i))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_prompts_of_mixed_length_in_one_batch_are_the_prompts_alone(pipe):
    together = draw(pipe, [*PROMPTS, "no"], num_images_per_prompt=2, generator=seeded(5), negative_prompt="yes no yes")
    for i, prompt in enumerate([*PROMPTS, "no"]):
        alone = draw(pipe, prompt, num_images_per_prompt=2, generator=seeded(5 + 2 * i), negative_prompt="yes no yes")
        torch.testing.assert_close(together[2 * i : 2 * i + 2], alone, rtol=0, atol=1e-5)


def test_a_list_of_generators_is_one_a_picture(pipe):
    together = draw(pipe, PROMPTS, generator=[seeded(8), seeded(3)])
    torch.testing.assert_close(together[1:], draw(pipe, PROMPTS[1], generator=[seeded(3)]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[:1], draw(pipe, PROMPTS[0], generator=seeded(8)), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="1 generators for 2 pictures"):
        draw(pipe, PROMPTS, generator=[seeded()])


def test_a_single_generator_is_left_as_it_was(pipe):
    generator = seeded(5)
    before = generator.get_state()
    first = draw(pipe, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(draw(pipe, generator=generator), first)


def test_without_a_generator_torchs_global_seed_decides(pipe):
    torch.manual_seed(3)
    one, two = draw(pipe, generator=None), draw(pipe, generator=None)
    torch.manual_seed(3)
    assert torch.equal(draw(pipe, generator=None), one)
    assert not torch.allclose(one, two, atol=1e-2)


# ---- what a call takes and gives


@pytest.mark.parametrize(("height", "width"), [(16, 48), (64, 32), (8, 8)])
def test_other_sizes_than_the_models(pipe, height, width):
    image = draw(pipe, height=height, width=width, output_type="pil")[0]
    assert image.size == (width, height)
    assert draw(pipe, height=height, width=width).shape == (1, 4, height // 8, width // 8)


def test_patches_make_sizes_coarser(monkeypatch):
    pipe = toy_pipeline(patch_size=2)
    assert pipe.spatial_factor == 16
    assert draw(pipe, width=48).shape == (1, 4, 4, 6)
    with pytest.raises(UserError, match="width 40 does not do: give a multiple of 16"):
        draw(pipe, width=40)


def test_latents_are_where_a_run_starts(pipe):
    noise = torch.randn(1, 4, 4, 4, generator=seeded(9))
    kept = noise.clone()
    first = draw(pipe, latents=noise, generator=None)
    assert torch.equal(first, draw(pipe, latents=noise, generator=seeded(1)))
    assert torch.equal(first, draw(pipe, generator=seeded(9)))
    assert torch.equal(noise, kept)
    with pytest.raises(UserError, match=r"latents have shape \(1, 4, 4, 4\): this call needs \(2, 4, 4, 4\)"):
        draw(pipe, PROMPTS, latents=noise)


def test_output_types_are_one_picture(pipe):
    latents = draw(pipe)
    pil, array, tensor = (draw(pipe, output_type=kind) for kind in ("pil", "np", "pt"))
    assert pil[0].mode == "RGB"
    assert array.shape == (1, 32, 32, 3)
    assert tensor.shape == (1, 3, 32, 32)
    assert np.allclose(array[0], tensor[0].permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype("uint8"))
    assert 0 <= array.min() < array.max() <= 1
    mean, std = (torch.tensor(pipe.transformer.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    decoded = pipe.vae.decode(latents * std + mean).sample.detach()
    torch.testing.assert_close(tensor, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_a_tuple_where_no_dict_is_wanted(pipe):
    out = pipe("no", num_inference_steps=2, generator=seeded(), output_type="latent", return_dict=False)
    assert isinstance(out, tuple)
    assert len(out) == 1
    assert torch.equal(out[0], draw(pipe, "no", num_inference_steps=2))


def test_a_callback_sees_each_step(pipe):
    seen = []

    def watch(its_pipe, step, timestep, tensors):
        assert its_pipe is pipe
        seen.append((step, float(timestep), tensors["latents"].clone()))
        return {}

    final = draw(pipe, callback_on_step_end=watch)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep, _ in seen] == pytest.approx([1000, 750, 500, 250])
    assert torch.equal(seen[-1][2], final)
    assert torch.equal(final, draw(pipe))


def test_a_callback_may_return_nothing(pipe):
    seen = []
    drawn = draw(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(step))
    assert seen == [0, 1, 2, 3]
    assert torch.equal(drawn, draw(pipe))


def test_a_callback_may_change_the_latents(pipe):
    def clear(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    assert not draw(pipe, callback_on_step_end=clear).any()
    early = draw(pipe, callback_on_step_end=lambda p, step, t, tensors: {"latents": tensors["latents"] + (step == 0)})
    assert not torch.allclose(early, draw(pipe), atol=1e-2)


def test_a_callback_may_stop_the_run(pipe, monkeypatch):
    calls, seen = expert_calls(pipe, monkeypatch), []

    def stop(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1
        return {}

    stopped = draw(pipe, callback_on_step_end=stop)
    assert len(calls) == 2
    assert torch.equal(stopped, seen[1])
    calls.clear()
    draw(pipe)
    assert len(calls) == 4  # the next run is not stopped


def test_an_autoencoder_told_to_slice_decodes_one_picture_at_a_time(pipe, monkeypatch):
    whole = draw(pipe, num_images_per_prompt=3, output_type="pt")
    sizes, decode = [], pipe.vae._decode
    monkeypatch.setattr(pipe.vae, "_decode", lambda z: (sizes.append(len(z)), decode(z))[1])
    pipe.vae.enable_slicing()
    torch.testing.assert_close(draw(pipe, num_images_per_prompt=3, output_type="pt"), whole, rtol=0, atol=1e-5)
    assert sizes == [1, 1, 1]


# ---- what the backbone does


def test_the_backbone_reads_each_prompt_once_and_the_empty_one_once_for_ever(pipe):
    calls = backbone_calls(pipe)
    draw(pipe, PROMPTS, num_images_per_prompt=3, num_inference_steps=8)
    assert calls == [2, 1]
    draw(pipe)
    assert calls == [2, 1, 1]
    draw(pipe, guidance_scale=1.0)
    assert calls == [2, 1, 1, 1]
    draw(pipe, negative_prompt="no")
    assert calls == [2, 1, 1, 1, 1, 1]


def test_what_diffusers_walks_all_parts_for_is_asked_once_a_call(pipe, monkeypatch):
    asked = Counter()
    for owner, name in ((LatteFlowPipeline, "_execution_device"), (LatteFlowTransformer, "dtype")):
        own = getattr(owner, name).fget
        monkeypatch.setattr(
            owner, name, property(lambda self, own=own, name=name: (asked.update([name]), own(self))[1])
        )
    draw(pipe)  # reads the empty prompt too
    asked.clear()
    draw(pipe)
    assert asked == {"_execution_device": 1, "dtype": 1}


def test_another_backbones_empty_prompt_is_read_anew(pipe):
    first = draw(pipe)
    pipe.backbone = toy_pipeline().backbone
    torch.nn.init.normal_(pipe.backbone.model.language_model.layers[0].self_attn.v_proj.weight, generator=seeded(4))
    fresh = toy_pipeline()
    fresh.backbone = pipe.backbone
    assert torch.equal(draw(pipe), draw(fresh))
    assert not torch.allclose(draw(pipe), first, atol=1e-4)


def test_training_the_experts_leaves_the_backbone_bit_for_bit(pipe):
    """Also where the optimizer was handed all that the pipeline holds."""
    before = {name: tensor.clone() for name, tensor in pipe.backbone.state_dict().items()}
    ids = pipe.processor(PROMPTS, padding_side="right")
    logits = pipe.backbone(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits
    replica = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    optimizer = torch.optim.AdamW([*pipe.transformer.parameters(), *pipe.backbone.parameters()], lr=0.01)
    for step in range(3):
        x_t = torch.randn(2, 4, 4, 4, generator=seeded(step))
        v = pipe.transformer(x_t, torch.tensor([0.2, 0.8]), pipe.encode_prompt(PROMPTS))
        v.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in pipe.backbone.state_dict().items():
        assert torch.equal(tensor, before[name])
    after = pipe.backbone(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits
    assert torch.equal(after, logits)
    assert not any(torch.equal(tensor, replica[name]) for name, tensor in pipe.transformer.state_dict().items())


# ---- saving and loading

FRESH = """
import sys, torch
from latteflow import LatteFlowPipeline
torch.set_num_threads(1)
pipe = LatteFlowPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("a red circle", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
image.save(sys.argv[2])
print(pipe.ask(image, "What is this?", max_new_tokens=8))
"""


def test_a_fresh_process_draws_the_same_pixels_and_answers_the_same(pipe, tmp_path):
    model, picture = tmp_path / "model", tmp_path / "picture.png"
    pipe.save_pretrained(model)
    image = draw(pipe, output_type="pil")[0]
    answer = pipe.ask(image, "What is this?", max_new_tokens=8)

    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", FRESH, str(model), str(picture)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(image))
    assert done.stdout.strip("\n") == answer


def test_a_saved_pipeline_holds_safetensors_and_json_and_no_code(saved_pipeline):
    kinds = {file.suffix for file in Path(saved_pipeline).rglob("*") if file.is_file()}
    assert kinds <= {".json", ".safetensors", ".jinja"}
    assert '"latteflow.models.transformer"' in (saved_pipeline / "model_index.json").read_text()


def test_is_loaded_in_float32_unless_asked(saved_pipeline):
    for given, dtype in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        pipe = LatteFlowPipeline.from_pretrained(saved_pipeline, **given)
        assert {pipe.transformer.dtype, pipe.backbone.dtype, pipe.vae.dtype} == {dtype}
    pipe.set_progress_bar_config(disable=True)
    latents = draw(pipe)
    assert latents.dtype == torch.float32  # the path is integrated in float32
    assert torch.isfinite(latents).all()
    assert isinstance(pipe.ask(toy_picture("circle", "red", "solid"), "What?", max_new_tokens=2), str)


def test_loaded_parts_are_frozen_where_they_should_be(saved_pipeline):
    pipe = LatteFlowPipeline.from_pretrained(saved_pipeline)
    assert not any(parameter.requires_grad for parameter in pipe.backbone.parameters())
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


# ---- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "prompt has to be a string"),
        ({"prompt": ["a", 3]}, "prompt has to be a string"),
        ({"height": 0}, "height 0 does not do: give a multiple of 8"),
        ({"height": -8}, "height -8 does not do"),
        ({"width": 33}, "width 33 does not do"),
        ({"height": 8_000, "width": 8_000}, "more than 16384 tokens of 8x8: draw smaller"),
        ({"num_inference_steps": 0}, "num_inference_steps has to be 1 to 1000: got 0"),
        ({"num_inference_steps": 1001}, "got 1001"),
        ({"guidance_scale": -0.1}, "guidance_scale has to be 0 to 100"),
        ({"guidance_scale": float("nan")}, "got nan"),
        ({"guidance_scale": float("inf")}, "got inf"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt has to be 1 or more"),
        ({"output_type": "jpeg"}, "output_type is pil, np, pt or latent: got 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"can hold \['latents'\] only"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(pipe, settings, message):
    calls = backbone_calls(pipe)
    with pytest.raises(UserError, match=message):
        pipe(**{"prompt": "a red circle", "num_inference_steps": 2, **settings})
    assert calls == []


def test_a_special_token_in_a_prompt_is_words(pipe):
    assert not torch.equal(draw(pipe, "a <|image_pad|>", output_type="pt"), draw(pipe, "a", output_type="pt"))


# ---- questions


def test_the_answer_is_the_backbones_own(pipe):
    image = toy_picture("circle", "red", "solid")
    prompt = pipe.processor.chat_prompt("What is this?", pictures=1)
    inputs = pipe.processor(prompt, [image])
    end = pipe.processor.tokenizer.eos_token_id
    output = pipe.backbone.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0)
    words = pipe.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert pipe.ask(image, "What is this?", max_new_tokens=8) == words.strip()


def test_the_answer_depends_on_the_picture(pipe):
    seen = []
    pipe.backbone.model.visual.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    for colour in ("red", "blue"):
        pipe.ask(toy_picture("circle", colour, "solid"), "What is this?", max_new_tokens=1)
    assert not torch.equal(seen[0], seen[1])


def pixels_that_the_backbone_sees(pipe, image):
    seen = []
    handle = pipe.backbone.model.visual.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert isinstance(pipe.ask(image, "What?", max_new_tokens=1), str)
    handle.remove()
    return seen[0]


def test_what_is_transparent_is_seen_on_white(pipe):
    shape = toy_picture("circle", "red", "solid")
    clear = shape.convert("RGBA")
    clear.putalpha(Image.fromarray((np.asarray(shape) != 255).any(-1).astype("uint8") * 255))
    cut = np.array(clear)
    cut[cut[..., 3] == 0] = 0  # black, were it seen
    expected = pixels_that_the_backbone_sees(pipe, shape)
    assert torch.equal(pixels_that_the_backbone_sees(pipe, Image.fromarray(cut)), expected)

    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    white = pixels_that_the_backbone_sees(pipe, palette)
    assert torch.equal(white, torch.ones_like(white))
    opaque = pixels_that_the_backbone_sees(pipe, Image.new("P", (32, 32), 0))
    assert torch.equal(opaque, -torch.ones_like(opaque))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "I;16", "F"])
def test_pictures_of_any_mode_are_read(pipe, mode):
    assert pixels_that_the_backbone_sees(pipe, Image.new(mode, (40, 24))).shape[1] == 3 * PATCH**2


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 40), (40, 3), (2, 150), (640, 480)])
def test_pictures_of_any_size_are_read(pipe, size):
    patches = pixels_that_the_backbone_sees(pipe, Image.new("RGB", size, (255, 0, 0)))
    red, green = patches.reshape(-1, 3, PATCH**2)[:, :2].unbind(1)
    assert torch.allclose(red, torch.ones_like(red))
    assert torch.allclose(green, -torch.ones_like(green))


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(pipe, question):
    with pytest.raises(UserError, match="the question is empty"):
        pipe.ask(toy_picture("circle", "red", "solid"), question)


def test_a_special_token_in_a_question_is_words(pipe):
    assert isinstance(pipe.ask(toy_picture("circle", "red", "solid"), "what is <|image_pad|>?"), str)
