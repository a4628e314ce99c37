"""Training sequences are what the chat template writes, and only answers are learnt."""

import pytest

from latteflow.data.prompts import Turn
from latteflow.models.processor import IMAGE_TOKEN, PICTURE
from latteflow.train.backbone import conversation_tokens

TURNS = [Turn("What is this?", "a red circle"), Turn("Which style is this?", "solid"), Turn("Is this a Cat?", "no")]


@pytest.mark.parametrize("head", ["", PICTURE.replace(IMAGE_TOKEN, IMAGE_TOKEN * 4)])
@pytest.mark.parametrize("number", [1, 3])
def test_tokens_are_those_of_the_whole_conversation(tokenizer, number, head):
    turns = TURNS[:number]
    messages = []
    for i, turn in enumerate(turns):
        messages.append({"role": "user", "content": (head if i == 0 else "") + turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    found = conversation_tokens(tokenizer, turns, head)
    assert found.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_labels_are_the_answers_and_their_ends(tokenizer):
    found = conversation_tokens(tokenizer, TURNS)
    assert len(found.labels) == len(found.ids)
    learnt = [label for label in found.labels if label != -100]
    expected = []
    for turn in TURNS:
        expected += [*tokenizer(turn.answer)["input_ids"], tokenizer.eos_token_id]
    assert learnt == expected
    assert all(label in (-100, token) for label, token in zip(found.labels, found.ids, strict=True))
    assert found.labels[0] == -100


def test_a_question_reads_as_the_prompt_that_is_asked_later(tokenizer, processor):
    """What the model is trained to continue is what ``ask`` hands it."""
    found = conversation_tokens(tokenizer, TURNS[:1], PICTURE.replace(IMAGE_TOKEN, IMAGE_TOKEN * 4))
    asked = processor.chat_prompt(TURNS[0].question, pictures=1).replace(IMAGE_TOKEN, IMAGE_TOKEN * 4)
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert found.ids[: len(ids)] == ids
    assert set(found.labels[: len(ids)]) == {-100}
    assert found.labels[len(ids)] != -100
