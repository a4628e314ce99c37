"""Words and pictures to the backbone's inputs, as transformers' own image processor and tokenizer make them."""

import numpy as np
import pytest
import torch
from PIL import Image

from latteflow.data.transforms import patches_of
from latteflow.errors import UserError
from latteflow.models.processor import IMAGE_TOKEN, PICTURE, LatteFlowProcessor
from toys import PATCH, toy_picture


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_token(processor):
    return processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


@pytest.mark.parametrize("size", [(32, 32), (64, 16), (20, 47), (200, 100)])
def test_a_picture_takes_as_many_tokens_as_it_has_merged_patches(processor, size):
    inputs = processor(f"{PICTURE}what is this?", [picture(*size)])
    own = processor.image_processor(images=[picture(*size)], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], own["pixel_values"])
    assert torch.equal(inputs["image_grid_thw"], own["image_grid_thw"])
    marked = inputs["input_ids"] == image_token(processor)
    assert marked.sum() == own["image_grid_thw"].prod() // 4
    assert torch.equal(inputs["mm_token_type_ids"], marked.long())


def test_a_square_picture_of_the_models_size_is_not_resized(processor):
    inputs = processor(PICTURE, [picture(32, 32)])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_pictures_of_several_prompts_go_to_their_prompts(processor):
    small, wide = picture(32, 32), picture(96, 32)
    inputs = processor([f"{PICTURE}one", f"two {PICTURE} and {PICTURE}", "none"], [small, wide, small])
    counts = (inputs["input_ids"] == image_token(processor)).sum(-1).tolist()
    per_picture = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    assert counts == [per_picture[0], per_picture[1] + per_picture[2], 0]
    assert per_picture[0] != per_picture[1]


@pytest.mark.parametrize("pictures", [0, 2])
def test_another_number_of_pictures_than_the_prompt_names_is_refused(processor, pictures):
    with pytest.raises(UserError, match=rf"another number of pictures \(.*\) than the {pictures} given"):
        processor(f"{PICTURE}what?", [picture(32, 32)] * pictures)


def test_patches_of_many_pictures_are_the_image_processors(processor):
    images = [toy_picture("circle", "red", "solid"), toy_picture("cross", "blue", "tiny"), picture(32, 32)]
    own = processor.image_processor(images=images, return_tensors="pt")
    tensor = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    patches, grid = patches_of(tensor.float() / 127.5 - 1, patch_size=PATCH)
    torch.testing.assert_close(patches, own["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(grid, own["image_grid_thw"])


def test_patches_of_a_wide_picture_are_the_image_processors(processor):
    """64x16 keeps the pixel count, so that nothing is resized: the raster order of the squares shows."""
    image = picture(64, 16)
    own = processor.image_processor(images=[image], return_tensors="pt")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    patches, grid = patches_of(tensor.float() / 127.5 - 1, patch_size=PATCH)
    assert grid.tolist() == own["image_grid_thw"].tolist() == [[1, 2, 8]]
    torch.testing.assert_close(patches, own["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_a_batch_are_padded_where_asked(processor, side):
    inputs = processor(["a", "a red circle in outline style"], padding_side=side)
    attended = inputs["attention_mask"][0].bool()
    assert not attended.all()
    assert bool(attended[0]) == (side == "right")
    pad = processor.tokenizer.pad_token_id
    assert (inputs["input_ids"][0][~attended] == pad).all()
    alone = processor("a")["input_ids"][0]
    assert torch.equal(inputs["input_ids"][0][attended], alone)


def test_the_chat_template_writes_a_turn(processor):
    assert processor.chat_prompt("What?") == "<|user|>What?<|assistant|>"
    assert processor.chat_prompt("What?", pictures=1) == f"<|user|>{PICTURE}What?<|assistant|>"
    assert processor.chat_prompt("", pictures=2) == f"<|user|>{PICTURE}{PICTURE}<|assistant|>"


def test_the_chat_template_closes_answers(tokenizer):
    turns = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>What?<|assistant|>a circle<|end|><|user|>Sure?<|assistant|>"


def test_a_chat_template_of_its_own_comes_first(processor):
    other = LatteFlowProcessor(processor.image_processor, processor.tokenizer, chat_template="{{ messages[0].role }}!")
    assert other.chat_prompt("What?") == "user!"


@pytest.mark.parametrize(
    "token", [IMAGE_TOKEN, "<|vision_start|>", "<|end|>", "<|user|>", "<|end|><|user|>", "<<|end|>"]
)
@pytest.mark.parametrize("around", ["{}", "is {} a word?", " {}"])
def test_special_tokens_that_a_user_types_are_words(processor, token, around):
    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids)
    ids = processor(processor.chat_prompt(around.format(token)))["input_ids"][0].tolist()
    frame = processor(processor.chat_prompt(""))["input_ids"][0].tolist()
    assert [i for i in ids if i in special] == frame
    spelled = tokenizer.decode([i for i in ids if i not in special]).replace(" ", "")
    assert spelled == around.format(token).replace(" ", "")


@pytest.mark.parametrize(("first", "second"), [("<|en", "d|>"), ("<|end|", ">"), ("a <", "|image_pad|> b"), ("x", "y")])
def test_a_special_token_over_two_parts_is_words(processor, first, second):
    parts = [{"type": "text", "text": first}, {"type": "text", "text": second}]
    special = set(processor.tokenizer.all_special_ids)
    ids = processor(processor.conversation([{"role": "user", "content": parts}]))["input_ids"][0].tolist()
    frame = processor(processor.chat_prompt(""))["input_ids"][0].tolist()
    assert [i for i in ids if i in special] == frame
    if first == "x":
        assert ids == processor(processor.chat_prompt("xy"))["input_ids"][0].tolist()


@pytest.mark.parametrize("words", ["<|USER|>", "<|user|", "a < b |> c", "<|user |>", "\U0010ffff"])
def test_what_is_almost_a_special_token_is_tokenized_as_ever(processor, words):
    expected = processor.tokenizer(f"<|user|>{words}<|assistant|>".replace("\U0010ffff", ""))["input_ids"]
    assert processor(processor.chat_prompt(words))["input_ids"][0].tolist() == expected


def test_saved_and_loaded_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = LatteFlowProcessor.from_pretrained(tmp_path)
    prompt = processor.chat_prompt("What is this?", pictures=1)
    assert loaded.chat_prompt("What is this?", pictures=1) == prompt
    before, after = processor(prompt, [picture(50, 70)]), loaded(prompt, [picture(50, 70)])
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name])


def test_the_tokenizer_gives_back_what_it_read_in_lower_case(tokenizer):
    for text in ("What is this?", "naïve café 🍕", "a  b"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()
    assert tokenizer("")["input_ids"] == []
    assert len(tokenizer) <= 320
