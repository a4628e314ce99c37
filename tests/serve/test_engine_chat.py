"""Answers: the library's own words, a token a turn, beside pictures and one another."""

import time

import pytest
import torch
from engine_toys import running

from latteflow.errors import UserError
from latteflow.serve.engine.requests import Cancelled, ChatRequest, DrawRequest, Finished, Progress, QueueFull, Words
from toys import toy_picture, toy_pipeline

LIMIT = 60
QUESTION = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": toy_picture("circle", "red", "solid")},
            {"type": "text", "text": "What is this?"},
        ],
    }
]


def test_a_greedy_answer_is_the_pipelines():
    pipe = toy_pipeline()
    expected = pipe.chat(QUESTION, max_new_tokens=12)["content"][0]["text"]
    words = []
    with running(pipe) as engine:
        ticket = engine.chat(ChatRequest(QUESTION, max_new_tokens=12))
        ticket.subscribe(words.append)
        finished = ticket.result(LIMIT)
    assert finished.text == expected
    assert "".join(event.text for event in words if isinstance(event, Words)).strip() == expected
    assert finished.completion_tokens <= 12
    assert finished.prompt_tokens == 13
    assert 0 <= finished.seconds_queued <= finished.seconds


def test_an_answer_says_whether_it_was_cut():
    pipe = toy_pipeline()
    with running(pipe) as engine:
        cut = engine.chat(ChatRequest(QUESTION, max_new_tokens=2)).result(LIMIT)
        pipe.backbone.generation_config.eos_token_id = list(range(len(pipe.processor.tokenizer)))
        whole = engine.chat(ChatRequest(QUESTION, max_new_tokens=2)).result(LIMIT)
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 2)
    assert (whole.finish_reason, whole.completion_tokens) == ("stop", 1)


def test_sampling_depends_on_the_seed_alone():
    requests = [ChatRequest(QUESTION, 8, temperature=1.5, top_p=0.9, seed=seed) for seed in (1, 2, 3)]
    with running() as engine:
        single = [engine.chat(request).result(LIMIT).text for request in requests]
        tickets = [engine.chat(request) for request in requests]
        engine.draw([DrawRequest("red", num_inference_steps=4)])
        assert [ticket.result(LIMIT).text for ticket in tickets] == single
    assert len(set(single)) == 3


def test_gumbel_noise_samples_the_softmax():
    from latteflow.serve.engine.answering import _Sample

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sample = _Sample(ChatRequest([], temperature=0.5, top_p=0.95, seed=3))
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(torch.zeros(1, 1), logits).argmax()] += 1
    expected = torch.softmax(logits[0] / 0.5, 0)
    expected[2:] = 0  # the first two hold 98%
    torch.testing.assert_close(counts / 4000, expected / expected.sum(), atol=0.03, rtol=0)


def test_words_and_pictures_take_turns():
    heard = []
    with running() as engine:
        engine.warm_up()
        answer = engine.chat(ChatRequest(QUESTION, max_new_tokens=20))
        [picture] = engine.draw([DrawRequest("red", num_inference_steps=60)])
        picture.subscribe(lambda event: heard.append("step") if isinstance(event, Progress) else None)
        answer.subscribe(lambda event: heard.append("end") if isinstance(event, Finished) else None)
        tokens = answer.result(LIMIT).completion_tokens
        picture.result(LIMIT)
    assert tokens > 5
    assert tokens - 4 <= heard.index("end") <= tokens + 4


def test_an_answer_can_be_given_up():
    with running() as engine:
        ticket = engine.chat(ChatRequest(QUESTION, max_new_tokens=4000))
        ticket.cancel()
        with pytest.raises(Cancelled):
            ticket.result(LIMIT)
        assert engine.chat(ChatRequest(QUESTION, max_new_tokens=2)).result(LIMIT).completion_tokens == 2
        engine.drain(LIMIT)
        assert engine.status().chats == 0


def test_waiting_answers_are_bounded():
    with running(max_chats=1, max_queued_chats=1) as engine:
        request = ChatRequest(QUESTION, max_new_tokens=2000)
        first = engine.chat(request)
        while engine._queue.chats:
            time.sleep(0.002)
        second = engine.chat(request)
        with pytest.raises(QueueFull):
            engine.chat(request)
        first.cancel()
        second.cancel()


def test_a_conversation_has_to_be_one():
    with running() as engine:
        with pytest.raises(UserError, match="user's turn"):
            engine.chat(ChatRequest([{"role": "assistant", "content": "hello"}]))
        with pytest.raises(UserError, match="a message needs"):
            engine.chat(ChatRequest([{"role": "user", "content": 3}])).result(LIMIT)
