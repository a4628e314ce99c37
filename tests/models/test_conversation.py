"""Conversations: the same words as a fresh start, with only what is new read."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer

from latteflow.errors import UserError
from latteflow.models.context import compute_context
from latteflow.models.conversation import ConversationCache
from toys import seeded, shake, toy_backbone, toy_picture, toy_pipeline, toy_processor, toy_tokenizer

RED = toy_picture("circle", "red", "solid")
BLUE = toy_picture("cross", "blue", "outline")
WIDE = BLUE.resize((64, 16))


def user(*parts):
    return {"role": "user", "content": [picture_or_words(part) for part in parts]}


def assistant(*parts):
    return {"role": "assistant", "content": [picture_or_words(part) for part in parts]}


def picture_or_words(part):
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


class Prefill:
    """Counts the tokens that a backbone reads."""

    def __init__(self, backbone):
        self.tokens = 0
        self.handle = backbone.model.language_model.layers[0].register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        self.tokens += hidden.shape[1]

    def taken(self):
        tokens, self.tokens = self.tokens, 0
        return tokens


@pytest.fixture(scope="module")
def backbone():
    # Words that differ: an untrained model's say the same whatever it is shown.
    return shake(toy_backbone(), seeded(5), 0.3)


@pytest.fixture(scope="module")
def processor():
    return toy_processor(toy_tokenizer())


def fresh_answer(backbone, processor, messages, tokens=6):
    images = [p["image"] for m in messages if not isinstance(m["content"], str) for p in m["content"] if "image" in p]
    inputs = processor(processor.conversation(messages), images)
    backbone.model.rope_deltas = None
    ids = backbone.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


CONVERSATIONS = [
    [user("What is this?")],
    [{"role": "user", "content": "Hello"}],
    [user(RED, "What is this?")],
    [user(RED, "and", WIDE, "What is this?")],
    [user("What?"), assistant("a red circle"), user(BLUE, "Sure?")],
    [user(RED, "What?"), assistant("a red circle"), user(WIDE, "And this?"), assistant(BLUE), user("Sure?")],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_an_answer_is_the_backbones_own(backbone, processor, messages):
    found = ConversationCache(backbone, processor).answer(messages, max_new_tokens=6)
    assert found == fresh_answer(backbone, processor, messages)


def test_every_turn_answers_as_a_fresh_start_would(backbone, processor):
    cache, messages, answers = ConversationCache(backbone, processor), [], []
    for turn in ((RED, "What is this?"), ("Which style is this?",), (WIDE, "And this?"), ("Describe this picture.",)):
        messages.append(user(*turn))
        answers.append(cache.answer(messages, max_new_tokens=6))
        assert answers[-1] == fresh_answer(backbone, processor, messages)
        messages.append(assistant(answers[-1]))
    assert len(set(answers)) > 1


def test_a_next_turn_reads_only_what_is_new(backbone, processor):
    cache, prefill = ConversationCache(backbone, processor), Prefill(backbone)
    messages = [user(RED, "What is this?")]
    whole = processor(processor.conversation(messages), [RED])["input_ids"].shape[1]
    answer = cache.answer(messages, max_new_tokens=6)
    made = prefill.taken() - whole
    messages += [assistant(answer), user("Sure?")]
    length = processor(processor.conversation(messages), [RED])["input_ids"].shape[1]
    cache.answer(messages, max_new_tokens=1)
    # The answer's words are read back from the cache, too, as far as they are tokenized the same.
    assert prefill.taken() <= length - whole
    assert made >= 1
    prefill.handle.remove()


def test_the_same_question_again_reads_one_token(backbone, processor):
    cache, prefill = ConversationCache(backbone, processor), Prefill(backbone)
    cache.answer([user(RED, "What is this?")], max_new_tokens=1)
    prefill.taken()
    cache.answer([user(RED, "What is this?")], max_new_tokens=1)
    assert prefill.taken() == 1
    prefill.handle.remove()


def test_another_picture_in_the_same_place_is_read(backbone, processor):
    cache = ConversationCache(backbone, processor)
    cache.answer([user(RED, "What is this?")], max_new_tokens=6)
    messages = [user(BLUE, "What is this?")]
    assert cache.answer(messages, max_new_tokens=6) == fresh_answer(backbone, processor, messages)


def test_a_conversation_that_goes_back_is_answered_as_a_fresh_one(backbone, processor):
    cache = ConversationCache(backbone, processor)
    long = [user(RED, "What?"), assistant("a red circle"), user(WIDE, "And this?")]
    cache.answer(long, max_new_tokens=6)
    for messages in (long[:1], [*long[:2], user("No?")], [user("Hello")], long):
        assert cache.answer(messages, max_new_tokens=6) == fresh_answer(backbone, processor, messages)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_context_is_what_the_prompt_alone_gives(backbone, processor, messages):
    cache = ConversationCache(backbone, processor)
    cache.answer(CONVERSATIONS[-1][:3], max_new_tokens=3)  # something to go on from, or to leave
    found = cache.context(messages)
    images = [p["image"] for m in messages if not isinstance(m["content"], str) for p in m["content"] if "image" in p]
    inputs = dict(processor(processor.conversation(messages), images))
    expected = compute_context(backbone, **inputs)
    torch.testing.assert_close(found.keys, expected.keys, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=2e-5)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.next_position, expected.next_position)


def test_a_failure_leaves_no_half_read_cache(backbone, processor):
    cache = ConversationCache(backbone, processor)
    cache.answer([user("What is this?")], max_new_tokens=6)

    def broken(module, args, kwargs):
        raise KeyError("broken")

    messages = [user("What is this?"), assistant("a red circle"), user("Sure?")]
    handle = backbone.model.language_model.layers[2].register_forward_pre_hook(broken, with_kwargs=True)
    with pytest.raises(KeyError):
        cache.answer(messages, max_new_tokens=6)
    handle.remove()
    assert cache.answer(messages, max_new_tokens=6) == fresh_answer(backbone, processor, messages)


@pytest.mark.parametrize("tokens", [1, 6, 200])
def test_no_more_is_known_than_is_in_the_cache(backbone, processor, tokens):
    """The last word of an answer is not read by the model that says it."""
    cache = ConversationCache(backbone, processor)
    cache.answer([user(RED, "What is this?")], max_new_tokens=tokens)
    assert len(cache._marks) == cache._cache.get_seq_length()


# ---- the pipeline


def test_draws_then_answers_in_one_conversation_without_reading_twice():
    pipe = toy_pipeline()
    prefill = Prefill(pipe.backbone)
    messages = [user("a red circle")]
    drawn = pipe.chat(messages, modalities=["image"], num_inference_steps=2, generator=seeded())
    image = drawn["content"][0]["image"]
    prompt = pipe.processor(pipe.processor.conversation(messages))["input_ids"].shape[1]
    empty = pipe.processor(pipe.processor.chat_prompt(""))["input_ids"].shape[1]
    assert prefill.taken() == prompt + empty  # and the unconditional context, which later turns keep

    messages += [drawn, user("What is this?")]
    answer = pipe.chat(messages, max_new_tokens=1)
    length = pipe.processor(pipe.processor.conversation(messages), [image])["input_ids"].shape[1]
    assert prefill.taken() == length - prompt
    assert answer["role"] == "assistant"
    assert isinstance(answer["content"][0]["text"], str)


def test_a_drawn_turn_is_the_picture_of_its_prompt():
    pipe = toy_pipeline()
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    drawn = pipe.chat([user("a red circle")], modalities=["image"], generator=seeded(), **settings)
    alone = pipe("a red circle", generator=seeded(), **settings).images[0]
    assert abs(drawn["content"][0]["image"] - alone).max() < 1e-5


def test_words_stream_as_they_come():
    pipe = toy_pipeline()
    shake(pipe.backbone, seeded(5), 0.3)
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    replies = []
    thread = threading.Thread(
        target=lambda: replies.append(pipe.chat([user("Hello")], streamer=streamer, max_new_tokens=8))
    )
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.strip() == replies[0]["content"][0]["text"] != ""


def test_sampling_follows_the_seed():
    pipe = toy_pipeline()
    torch.manual_seed(3)
    one = pipe.chat([user("Hello")], do_sample=True, max_new_tokens=12)
    torch.manual_seed(3)
    assert pipe.chat([user("Hello")], do_sample=True, max_new_tokens=12) == one
    assert pipe.chat([user("Hello")], do_sample=True, max_new_tokens=12) != one


MISTAKES = [
    ([], {}, "end with a user's turn"),
    ([assistant("Hello")], {}, "end with a user's turn"),
    ([user("a")], {"modalities": ["video"]}, "modalities is"),
    ([user("a")], {"modalities": ["text", "image"]}, "modalities is"),
    ([{"role": "tool", "content": "x"}, user("a")], {}, "a message needs a role"),
    ([{"role": "user"}], {}, "a message needs a role"),
    ([{"role": "user", "content": [{"type": "video"}]}], {}, "a text or an image"),
    ([{"role": "user", "content": [{"type": "image", "image": "http://a/b.png"}]}], {}, "holds a PIL picture"),
    ([user("a")], {"modalities": ["image"], "num_inference_steps": 0}, "num_inference_steps"),
]


@pytest.mark.parametrize(("messages", "settings", "reason"), MISTAKES)
def test_a_mistake_is_refused(messages, settings, reason):
    with pytest.raises(UserError, match=reason):
        toy_pipeline().chat(messages, **settings)
