"""Every family: the context is what the backbone itself would have cached, words, pictures and places."""

import pytest
import torch
from transformers import DynamicCache

from families import MODEL_TYPES, VARIANTS, WINDOW, shared_family, toy_family, toy_picture
from latteflow.errors import UserError
from latteflow.models.backbones import family_of
from latteflow.models.context import compute_context

PICTURES = [toy_picture(60, 30, 1), toy_picture(32, 32, 2), toy_picture(40, 90, 3)]
MULTIMODAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def reading(processor, *prompts):
    """Ids, mask and the pictures' inputs of prompts: each a text and a number of pictures."""
    texts = [processor.chat_prompt(text, pictures=pictures) for text, pictures in prompts]
    number = sum(pictures for _, pictures in prompts)
    inputs = dict(processor(texts, PICTURES[:number], padding_side="right"))
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    return ids, mask, inputs if number else {}


def cached(cache):
    return torch.stack([layer.keys for layer in cache.layers], 1), torch.stack([one.values for one in cache.layers], 1)


def positions_read(backbone):
    """A list that fills with the positions that the rotary module is asked for, one entry a call of the model."""
    found, text = [], family_of(backbone.config).text_model(backbone)

    def record(_, args, kwargs):
        found.append(kwargs.get("position_ids", args[1] if len(args) > 1 else None))

    hook = text.rotary_emb.register_forward_pre_hook(record, with_kwargs=True)
    return found, hook


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_is_the_cache_of_the_backbones_ordinary_forward(variant, pictures):
    """The ordinary forward numbers the tokens itself: nothing but the processor's output is handed to it."""
    backbone, processor = shared_family(variant)
    ids, mask, inputs = reading(processor, ("a red circle", pictures))
    context = compute_context(backbone, ids, mask, **inputs)
    cache = DynamicCache(config=backbone.config.get_text_config())
    with torch.no_grad():
        backbone(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs)
    keys, values = cached(cache)
    assert torch.equal(context.keys, keys)
    assert torch.equal(context.values, values)
    assert context.mask.all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_padded_in_a_batch_have_the_context_that_they_have_alone(variant):
    """Prompts with one, no and two pictures: pixels of one prompt stay with it."""
    backbone, processor = shared_family(variant)
    prompts = [("a red circle", 1), ("an emoji of a green square drawn in outline style", 0), ("no", 2)]
    ids, mask, inputs = reading(processor, *prompts)
    together = compute_context(backbone, ids, mask, **inputs)
    assert not mask.bool().all()
    rest = iter(PICTURES)
    for number, (text, pictures) in enumerate(prompts):
        prompt, own = processor.chat_prompt(text, pictures=pictures), [next(rest) for _ in range(pictures)]
        inputs = dict(processor(prompt, own, padding_side="right"))
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        alone = compute_context(backbone, ids, mask, **(inputs if own else {}))
        length = ids.shape[1]
        assert together.mask[number].tolist() == [True] * length + [False] * (together.mask.shape[1] - length)
        assert together.next_position[number] == alone.next_position[0]
        torch.testing.assert_close(together.keys[number, :, :, :length], alone.keys[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(together.values[number, :, :, :length], alone.values[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_next_position_is_the_one_that_generate_goes_on_from(variant, pictures):
    backbone, processor = shared_family(variant)
    ids, mask, inputs = reading(processor, ("a red circle", pictures))
    context = compute_context(backbone, ids, mask, **inputs)
    found, hook = positions_read(backbone)
    backbone.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, do_sample=False, **inputs)
    hook.remove()
    following = found[-1]
    assert following.shape[-1] == 1
    assert set(following.flatten().tolist()) == {int(context.next_position[0])}
    if variant in MULTIMODAL and pictures:
        assert int(context.next_position[0]) < ids.shape[1]  # a picture takes fewer positions than tokens


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_later_words_read_from_the_context_as_from_the_whole(variant, pictures):
    backbone, processor = shared_family(variant)
    ids, mask, inputs = reading(processor, ("a red circle", pictures))
    context = compute_context(backbone, ids, mask, **inputs)
    more = processor("the green square")["input_ids"]

    text = backbone.config.get_text_config()
    extended, whole = DynamicCache(config=text), DynamicCache(config=text)
    for number in range(text.num_hidden_layers):
        extended.update(*context.layer(number), number)
    positions = context.next_position[:, None] + torch.arange(more.shape[1])
    name = family_of(backbone.config).token_types
    both = torch.cat([ids, more], dim=1)
    kinds = {name: torch.cat([inputs[name], torch.zeros_like(more)], 1)} if pictures and name else {}
    with torch.no_grad():
        backbone(
            input_ids=more,
            attention_mask=torch.ones_like(both),
            position_ids=positions.expand(3, *more.shape) if variant in MULTIMODAL else positions,
            past_key_values=extended,
        )
        backbone(input_ids=both, attention_mask=torch.ones_like(both), past_key_values=whole, **{**inputs, **kinds})
    for mine, theirs in zip(cached(extended), cached(whole), strict=True):
        assert mine.shape[-2] == both.shape[1]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_does_not_depend_on_what_was_read_before(variant):
    """Qwen2-VL keeps the last picture's offset of positions on the model."""
    backbone, processor = toy_family(variant)
    words, picture = reading(processor, ("a red circle", 0)), reading(processor, ("a red circle", 1))
    fresh = compute_context(backbone, *words[:2])
    with torch.no_grad():
        backbone.generate(input_ids=picture[0], attention_mask=picture[1], max_new_tokens=2, **picture[2])
    again = compute_context(backbone, *words[:2])
    assert torch.equal(fresh.keys, again.keys)
    assert torch.equal(fresh.next_position, again.next_position)


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_a_picture_in_the_prompt_is_seen(variant):
    backbone, processor = shared_family(variant)
    prompt = processor.chat_prompt("a red circle", pictures=1)
    contexts = []
    for seed in (1, 2):
        inputs = dict(processor(prompt, [toy_picture(32, 32, seed)], padding_side="right"))
        contexts.append(compute_context(backbone, inputs.pop("input_ids"), inputs.pop("attention_mask"), **inputs))
    assert contexts[0].keys.shape == contexts[1].keys.shape
    assert not torch.allclose(contexts[0].values[..., -1, :], contexts[1].values[..., -1, :], atol=1e-4)


def test_deepstack_does_nothing_for_words_and_is_in_the_context_of_pictures():
    backbone, processor = toy_family("qwen3_vl")
    words, picture = reading(processor, ("a red circle", 0)), reading(processor, ("a red circle", 1))

    def contexts():
        return [compute_context(backbone, ids, mask, **inputs) for ids, mask, inputs in (words, picture)]

    before = contexts()
    with torch.no_grad():
        for parameter in backbone.model.visual.deepstack_merger_list.parameters():
            parameter.mul_(2)
    after = contexts()
    assert torch.equal(before[0].keys, after[0].keys)
    assert torch.equal(before[0].values, after[0].values)
    marked = picture[2]["mm_token_type_ids"][0].bool()
    moved = (before[1].values - after[1].values)[0].abs().amax((1, 3))
    assert moved[0].max() == 0  # the first layer reads what the vision tower's last gave
    assert moved[1:, marked].min() > 0
    assert moved[:, ~marked][:, : int(marked.int().argmax())].max() == 0  # words in front of the picture


def test_gemma_reads_a_prompt_that_its_window_holds_and_no_longer_one():
    backbone, processor = shared_family("gemma3")
    ids = processor("a red circle " * 40)["input_ids"][:, : WINDOW + 1]
    fits, too_long = ids[:, : WINDOW - 1], ids[:, :WINDOW]
    context = compute_context(backbone, fits, torch.ones_like(fits))
    assert context.keys.shape[-2] == WINDOW - 1
    cache = DynamicCache(config=backbone.config.get_text_config())
    with torch.no_grad():
        backbone(input_ids=too_long, past_key_values=cache)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [WINDOW - 1, WINDOW] * 2  # what is gone
    with pytest.raises(UserError, match=rf"{WINDOW} tokens; some layers .* window of {WINDOW - 1}"):
        compute_context(backbone, too_long, torch.ones_like(too_long))
