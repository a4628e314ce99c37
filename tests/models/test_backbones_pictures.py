"""Every family: words and pictures become the inputs that transformers' own processor makes, without torchvision."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3Processor, Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm import processing_smolvlm

from families import MODEL_TYPES, shared_family, toy_family, toy_image_processor, toy_picture
from latteflow.errors import UserError
from latteflow.models.backbones import family_named
from latteflow.models.processor import LatteFlowProcessor

SIZES = [(32, 32), (64, 32), (32, 64), (20, 50), (100, 30), (90, 90), (33, 31), (128, 127), (160, 20)]
ALONE = [[(32, 32)], [(100, 30)], [(20, 50), (64, 32)], []]


def without_videos(kind):
    """transformers' own processor without its video processor, which needs torchvision."""

    class Own(kind):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **settings):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **settings)

    return Own


def own_processor(variant, monkeypatch):
    """transformers' own processor of the toy."""
    _, ours = shared_family(variant)
    parts = toy_image_processor(variant), ours.tokenizer
    if variant == "idefics3":
        return Idefics3Processor(*parts, image_seq_len=ours.tokens_per_tile, chat_template=ours.chat_template)
    if variant == "gemma3":
        return Gemma3Processor(*parts, chat_template=ours.chat_template, image_seq_length=ours.tokens_per_tile)
    if variant == "smolvlm":
        monkeypatch.setattr(processing_smolvlm, "num2words", str)  # for videos only, and not installed
    kind, settings = {
        "qwen2_vl": (Qwen2VLProcessor, {}),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, {}),
        "qwen3_vl": (Qwen3VLProcessor, {}),
        "smolvlm": (processing_smolvlm.SmolVLMProcessor, {"image_seq_len": ours.tokens_per_tile}),
        "internvl": (InternVLProcessor, {"image_seq_length": ours.tokens_per_tile}),
        "llava_onevision": (
            LlavaOnevisionProcessor,
            {"num_image_tokens": ours.tokens_per_tile, "vision_feature_select_strategy": "full"},
        ),
    }[variant]
    theirs = without_videos(kind)(*parts, chat_template=ours.chat_template, **settings)
    theirs.video_processor = SimpleNamespace(num_frames=1, fps=1)  # SmolVLM's reads these for any conversation
    return theirs


def messages_of(text, number):
    content = [{"type": "image"}] * number + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def pictures_of(sizes):
    return [toy_picture(*size, seed) for seed, size in enumerate(sizes)]


def assert_same_inputs(variant, ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        other = theirs[name]
        if variant in ("idefics3", "smolvlm") and len(other) > len(mine):
            other = other[other.flatten(1).any(1)]  # theirs keeps a row of zeros for a prompt without a picture
        assert mine.dtype == other.dtype or name == "batch_num_images"
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("sizes", ALONE, ids=["square", "wide", "two", "none"])
@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_a_prompt_becomes_what_transformers_own_processor_makes(variant, sizes, monkeypatch):
    _, processor = shared_family(variant)
    theirs, images = own_processor(variant, monkeypatch), pictures_of(sizes)
    prompt = processor.chat_prompt("What is this?", pictures=len(sizes))
    template = theirs.apply_chat_template(
        messages_of("What is this?", len(sizes)), tokenize=False, add_generation_prompt=True
    )
    assert prompt == template
    given = {"images": [images]} if images else {}
    expected = theirs(text=[prompt], **given, add_special_tokens=False, return_tensors="pt")
    assert_same_inputs(variant, processor(prompt, images), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_a_batch_becomes_what_transformers_own_processor_makes(variant, side, monkeypatch):
    _, processor = shared_family(variant)
    theirs = own_processor(variant, monkeypatch)
    groups = [pictures_of([(100, 30)]), [], pictures_of([(20, 50), (64, 64)])]
    prompts = [processor.chat_prompt("What is this?", pictures=len(group)) for group in groups]
    expected = theirs(
        text=prompts, images=groups, add_special_tokens=False, return_tensors="pt", padding=True, padding_side=side
    )
    flat = [image for group in groups for image in group]
    assert_same_inputs(variant, processor(prompts, flat, padding_side=side), expected)


def features_of(backbone, inputs):
    """What the model's vision side returns for all pictures, (tokens, hidden size)."""
    pictures = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask") and "type_ids" not in k}
    with torch.no_grad():
        output = backbone.model.get_image_features(**pictures).pooler_output
    return torch.cat([part.flatten(0, -2) for part in output])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_a_picture_takes_as_many_tokens_as_the_model_has_features_of_it(variant, size):
    backbone, processor = shared_family(variant)
    inputs = processor(processor.chat_prompt("What?", pictures=1), [toy_picture(*size)])
    marked = inputs["input_ids"] == backbone.config.image_token_id
    assert int(marked.sum()) == len(features_of(backbone, inputs)) > 0
    kinds = [value for name, value in inputs.items() if "type_ids" in name]
    assert all(torch.equal(value, marked.long()) for value in kinds)


@pytest.mark.parametrize("groups", [[2], [3], [1, 2], [2, 0, 1], [1, 1]], ids=str)
@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_several_pictures_take_as_many_tokens_as_the_model_has_features_of_them(variant, groups):
    backbone, processor = shared_family(variant)
    prompts = [processor.chat_prompt("What?", pictures=number) for number in groups]
    images = pictures_of(SIZES[1 : 1 + sum(groups)])
    inputs = processor(prompts, images)
    marked = inputs["input_ids"] == backbone.config.image_token_id
    assert int(marked.sum()) == len(features_of(backbone, inputs))
    assert marked.any(-1).tolist() == [number > 0 for number in groups]
    with torch.no_grad():
        assert backbone(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_a_picture_is_seen_alike_beside_another_where_the_family_says_so(variant):
    """A conversation that goes on reads its new pictures alone."""
    backbone, processor = shared_family(variant)
    images = pictures_of([(100, 30), (64, 64)])
    both = features_of(backbone, processor(processor.chat_prompt("What?", pictures=2), images))
    alone = [features_of(backbone, processor(processor.chat_prompt("What?", pictures=1), [one])) for one in images]
    if family_named(variant).pictures_are_independent:
        torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)
    else:
        assert len(both) < sum(map(len, alone))


@pytest.mark.parametrize("variant", ["idefics3", "smolvlm", "internvl", "llava_onevision"])
def test_large_pictures_are_cut_into_tiles(variant):
    """Otherwise the tests above would say nothing of tiles."""
    _, processor = shared_family(variant)
    few, many = (processor(processor.chat_prompt("", pictures=1), [toy_picture(*size)]) for size in SIZES[:8:7])
    tiles = [inputs["pixel_values"].shape[:-3].numel() for inputs in (few, many)]
    assert max(tiles) >= 4
    assert len(set(tiles)) == (1 if "idefics" in variant or "smol" in variant else 2)  # these bring all to one size


@pytest.mark.parametrize("variant", ["idefics3", "smolvlm"])
def test_a_picture_that_is_not_cut_is_one_row_of_tokens(variant, monkeypatch):
    backbone, _ = toy_family(variant)
    theirs = own_processor(variant, monkeypatch)
    theirs.image_processor.size = {"longest_edge": 32}
    processor = LatteFlowProcessor(theirs.image_processor, theirs.tokenizer, family=variant, tokens_per_tile=4)
    prompt, image = processor.chat_prompt("What?", pictures=1), toy_picture(60, 60)
    inputs = processor(prompt, [image])
    assert_same_inputs(variant, inputs, theirs(text=[prompt], images=[[image]], return_tensors="pt"))
    assert int((inputs["input_ids"] == backbone.config.image_token_id).sum()) == len(features_of(backbone, inputs)) == 4


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_saved_and_loaded_is_the_same(variant, tmp_path):
    _, processor = shared_family(variant)
    processor.save_pretrained(tmp_path)
    loaded = LatteFlowProcessor.from_pretrained(tmp_path)
    assert type(loaded.image_processor) is type(processor.image_processor)
    prompt, images = processor.chat_prompt("What is this?", pictures=2), pictures_of([(50, 70), (100, 30)])
    assert loaded.chat_prompt("What is this?", pictures=2) == prompt
    before, after = processor([prompt, "no"], images), loaded([prompt, "no"], images)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name])
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".jinja"}


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_special_tokens_that_a_user_types_are_words(variant, pictures):
    """Every special token of the tokenizer: alone, in a sentence, twice in a row."""
    _, processor = shared_family(variant)
    tokenizer, images = processor.tokenizer, pictures_of([(40, 40)] * pictures)
    special = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    frame = processor(processor.chat_prompt("", pictures=pictures), images)["input_ids"][0].tolist()
    expected = [i for i in frame if i in special]
    words_of_frame = tokenizer.decode([i for i in frame if i not in special])
    assert len(special) >= 5
    assert family_named(variant).image_token in map(str, tokenizer.added_tokens_decoder.values())
    for token in map(str, tokenizer.added_tokens_decoder.values()):
        for typed in (token, f"is {token} a word?", f"{token}{token}", f"<{token}"):
            ids = processor(processor.chat_prompt(typed, pictures=pictures), images)["input_ids"][0].tolist()
            assert [i for i in ids if i in special] == expected
            spelled = tokenizer.decode([i for i in ids if i not in special])
            assert len(spelled) == len(words_of_frame) + len(typed)
            assert typed in spelled


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_another_number_of_pictures_than_the_prompt_names_is_refused(variant):
    _, processor = shared_family(variant)
    with pytest.raises(UserError, match="another number of pictures"):
        processor(processor.chat_prompt("What?", pictures=1), pictures_of(SIZES[:2]))
