"""The engine: whatever shares its forwards, a picture is the one that the pipeline draws alone."""

import threading
import time

import numpy as np
import pytest
import torch
from engine_toys import PROMPTS, alone, double_pipeline, pixels, running
from torch._dynamo.testing import CompileCounter

from latteflow.errors import UserError
from latteflow.flow.schedulers import SCHEDULERS
from latteflow.models.compilation import runs_compiled
from latteflow.serve.engine.requests import (
    Cancelled,
    ChatRequest,
    DeadlineExceeded,
    Draining,
    DrawRequest,
    EngineFailed,
    Finished,
    OutOfMemory,
    Progress,
    QueueFull,
    Ticket,
    Words,
)
from toys import toy_pipeline

LIMIT = 60
"""Seconds that nothing here takes: what hangs fails."""


def many(number=6, **settings):
    return [
        DrawRequest(
            PROMPTS[i % len(PROMPTS)],
            negative_prompt="green" if i % 3 == 1 else "",
            seed=i,
            num_inference_steps=3 + i % 4,
            guidance_scale=(1.0, 4.0, 2.5)[i % 3],
            guidance_interval=(0.0, 1.0) if i % 2 else (0.3, 0.8),
            **settings,
        )
        for i in range(number)
    ]


def slow_steps(pipe, seconds=0.02):
    """Make every forward take its time, so that a test can act meanwhile."""
    step = pipe.transformer.step

    def slowly(*given):
        time.sleep(seconds)
        return step(*given)

    pipe.transformer.step = slowly
    return pipe


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_crowd_is_drawn_as_each_alone(scheduler):
    pipe = double_pipeline(scheduler=scheduler)
    requests = [*many(7), DrawRequest("blue", seed=9, height=16, width=40)]
    expected = [alone(pipe, request) for request in requests]
    with running(pipe) as engine:
        drawn = [ticket.result(LIMIT).image for ticket in engine.draw(requests)]
    for one, other in zip(expected, drawn, strict=True):
        assert np.abs(one - pixels(other)).max() <= 1
    assert len({one.tobytes() for one in expected}) == len(expected)


def test_pictures_at_different_times_share_a_forward():
    seen = []

    class Counting:
        def stepped(self, group, batch, seconds):
            seen.append((group, batch))

        def ended(self, *_):
            pass

    pipe = slow_steps(toy_pipeline())
    with running(pipe, Counting()) as engine:
        [first] = engine.draw([DrawRequest("red", num_inference_steps=8, seed=1)])
        second = []
        first.subscribe(
            lambda event: second or second.extend(engine.draw([DrawRequest("blue", num_inference_steps=6)]))
        )
        first.result(LIMIT)
        second[0].result(LIMIT)
    assert {batch for _, batch in seen} == {1, 2}


def test_events_come_in_order_and_end_once():
    with running() as engine:
        engine.warm_up()
        [ticket] = engine.draw([DrawRequest("red", num_inference_steps=4, preview_every=2)])
        finished = ticket.result(LIMIT)
        events = []
        ticket.subscribe(events.append)
    steps = [event for event in events if isinstance(event, Progress)]
    assert [event.step for event in steps] == [1, 2, 3, 4]
    assert [event.group for event in steps] == [0, 0, 1, 1]
    assert [event.t for event in steps] == [0.0, 0.25, 0.5, 0.75]
    assert events[-1] is finished
    assert isinstance(finished, Finished)
    assert finished.image.size == (32, 32)
    assert finished.prompt_tokens == engine.pipe.encode_prompt(["red"]).mask.shape[1]


def test_previews_are_shown_where_they_are_due():
    shown = []
    with running(slow_steps(toy_pipeline())) as engine:
        engine.warm_up()
        [ticket] = engine.draw([DrawRequest("red", num_inference_steps=5, preview_every=2)])
        ticket.subscribe(shown.append)
        ticket.result(LIMIT)
    previews = {event.step: event.preview for event in shown if isinstance(event, Progress) and event.preview}
    assert set(previews) == {2, 4}
    assert all(preview.size == (32, 32) for preview in previews.values())


def test_deterministic_pictures_have_the_same_bits_in_any_company():
    requests = many(5)
    with running(deterministic=True, max_batch=4) as engine:
        single = [engine.draw([request])[0].result(LIMIT).image for request in requests]
        crowd = [ticket.result(LIMIT).image for ticket in engine.draw(requests)]
    assert [image.tobytes() for image in single] == [image.tobytes() for image in crowd]


def test_compiled_groups_are_not_compiled_anew_once_warm():
    """What warming up has compiled is enough for any number of pictures, any length of prompts, and any times."""
    torch._dynamo.reset()
    pipe = toy_pipeline()
    requests = [*many(7), DrawRequest("a red circle " * 12, seed=8, num_inference_steps=3)]
    expected = [alone(pipe, request) for request in requests] * 2
    counter = CompileCounter()
    pipe.compile(backend=counter)
    with running(pipe) as engine:
        engine.warm_up()
        made = counter.frame_count
        drawn = [ticket.result(LIMIT).image for ticket in engine.draw(requests)]
        drawn += [engine.draw([request])[0].result(LIMIT).image for request in requests]
        assert runs_compiled(pipe.transformer)
    assert 0 < made == counter.frame_count
    assert all(np.abs(one - pixels(other)).max() <= 1 for one, other in zip(expected, drawn, strict=True))


def test_more_than_may_be_under_way_wait_their_turn():
    pipe = toy_pipeline()
    with running(pipe, max_active=2, max_batch=2) as engine:
        tickets = engine.draw(many(7))
        assert all(isinstance(ticket.result(LIMIT), Finished) for ticket in tickets)
        assert engine.status().active == engine.status().queued == engine.status().queued_work == 0


def test_a_full_queue_refuses_all_or_none():
    with running(slow_steps(toy_pipeline()), max_active=1, max_queued_pictures=2) as engine:
        one = DrawRequest("red", num_inference_steps=40)
        [first] = engine.draw([one])
        waited_for(lambda: engine.status().active == 1)
        engine.draw([one])
        with pytest.raises(QueueFull) as refused:
            engine.draw([one, one])
        assert 1 <= refused.value.retry_after <= 120
        assert engine.status().queued == 1
        engine.draw([one])
        with pytest.raises(QueueFull):
            engine.draw([one])
        with pytest.raises(UserError, match="whole queue"):
            engine.draw([one] * 3)
        first.cancel()


def waited_for(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def test_a_cancelled_picture_takes_no_further_step():
    pipe = slow_steps(toy_pipeline())
    with running(pipe, max_active=2) as engine:
        kept, dropped, queued = engine.draw([DrawRequest("red", seed=i, num_inference_steps=30) for i in range(3)])
        steps = []
        dropped.subscribe(lambda event: (steps.append(event), dropped.cancel()))
        queued.cancel()
        with pytest.raises(Cancelled):
            dropped.result(LIMIT)
        with pytest.raises(Cancelled):
            queued.result(LIMIT)
        assert len([event for event in steps if isinstance(event, Progress)]) == 1
        assert kept.result(LIMIT).image.tobytes()
        assert engine.status().active == engine.status().queued_work == 0
        assert len(engine._executor) == 0


def test_deadlines_hold_in_the_queue_and_under_way():
    pipe = slow_steps(toy_pipeline())
    with running(pipe, max_active=1) as engine:
        under_way, waiting = engine.draw(
            [
                DrawRequest("red", num_inference_steps=60, timeout=0.3),
                DrawRequest("red", num_inference_steps=2, timeout=0.1),
            ]
        )
        started = []
        waiting.subscribe(started.append)
        for ticket in (waiting, under_way):
            with pytest.raises(DeadlineExceeded):
                ticket.result(LIMIT)
        assert not any(isinstance(event, Progress) for event in started)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"height": 33}, "height"),
        ({"seed": -1}, "seed"),
        ({"guidance_interval": (0.8, 0.1)}, "guidance_interval"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(wrong, message):
    with running() as engine, pytest.raises(UserError, match=message):
        engine.draw([DrawRequest("red", **wrong)])


def test_a_conversation_can_be_drawn():
    pipe = double_pipeline()
    talk = [{"role": "user", "content": "a red circle"}]
    expected = pipe.chat(talk, modalities=["image"], num_inference_steps=3, generator=torch.Generator().manual_seed(4))
    with running(pipe) as engine:
        [ticket] = engine.draw([DrawRequest(talk, seed=4, num_inference_steps=3)])
        [broken] = engine.draw([DrawRequest([{"role": "user", "content": 3}])])
        drawn = ticket.result(LIMIT).image
        with pytest.raises(UserError, match="a message needs"):
            broken.result(LIMIT)
    assert np.abs(pixels(expected["content"][0]["image"]) - pixels(drawn)).max() <= 1


def test_memory_that_does_not_suffice_halves_the_forward():
    pipe = toy_pipeline()
    step = pipe.transformer.step
    sizes = []

    def scarce(group, x_t, *given):
        sizes.append(len(x_t))
        if len(x_t) > 4:
            raise torch.OutOfMemoryError("no room")
        return step(group, x_t, *given)

    requests = [DrawRequest("red", seed=i, num_inference_steps=2) for i in range(4)]
    expected = [alone(pipe, request) for request in requests]
    pipe.transformer.step = scarce
    with running(pipe) as engine:
        drawn = [ticket.result(LIMIT).image for ticket in engine.draw(requests)]
    assert max(sizes) == 8
    assert all(np.abs(one - pixels(other)).max() <= 1 for one, other in zip(expected, drawn, strict=True))


def test_a_picture_that_alone_is_too_much_fails_alone():
    pipe = toy_pipeline()
    step = pipe.transformer.step

    def scarce(group, x_t, *given):
        if x_t.shape[-1] > 4:
            raise torch.OutOfMemoryError("no room")
        return step(group, x_t, *given)

    pipe.transformer.step = scarce
    with running(pipe) as engine:
        small, large = engine.draw([DrawRequest("red", num_inference_steps=2), DrawRequest("red", height=64, width=64)])
        with pytest.raises(OutOfMemory):
            large.result(LIMIT)
        assert small.result(LIMIT).image is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_fails_everything_and_says_so():
    pipe = toy_pipeline()

    def broken(*_):
        raise RuntimeError("a secret path")

    pipe.transformer.step = broken
    with running(pipe, max_active=1) as engine:
        tickets = engine.draw(many(3))
        tickets.append(engine.chat(ChatRequest([{"role": "user", "content": "What is this?"}])))
        for ticket in tickets:
            with pytest.raises(EngineFailed) as failed:
                ticket.result(LIMIT)
            assert "secret" not in str(failed.value)
        assert engine.status().failed == "RuntimeError"
        assert not engine.status().ready
        with pytest.raises(EngineFailed):
            engine.draw(many(1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_being_decoded_when_the_engine_breaks_is_no_second_failure():
    pipe = toy_pipeline()
    step, decode, decoding, broken = pipe.transformer.step, pipe.decode, threading.Event(), threading.Event()

    def breaking(group, x_t, *given):
        if decoding.is_set():
            raise RuntimeError("x")
        return step(group, x_t, *given)

    def late(latents):
        decoding.set()
        assert broken.wait(LIMIT)
        return decode(latents)

    pipe.transformer.step, pipe.decode = breaking, late
    with running(pipe) as engine:
        tickets = engine.draw([DrawRequest("red", num_inference_steps=2), DrawRequest("red", num_inference_steps=1000)])
        for ticket in tickets:
            with pytest.raises(EngineFailed):
                ticket.result(LIMIT)
        broken.set()
        engine.stop()  # the decoder ends in peace
        assert engine.status().failed == "RuntimeError"


def test_draining_finishes_what_is_under_way_and_refuses_the_rest():
    pipe = slow_steps(toy_pipeline())
    with running(pipe, max_active=1) as engine:
        engine.warm_up()
        under_way, waiting = engine.draw([DrawRequest("red", num_inference_steps=10)] * 2)
        waited_for(lambda: engine.status().active == 1)
        assert engine.drain(LIMIT)
        assert under_way.result(LIMIT).image is not None
        with pytest.raises(Draining):
            waiting.result(LIMIT)
        with pytest.raises(Draining):
            engine.draw(many(1))
        assert engine.status().draining
        assert not engine.status().ready


def test_draining_takes_no_longer_than_allowed():
    with running(slow_steps(toy_pipeline())) as engine:
        [ticket] = engine.draw([DrawRequest("red", num_inference_steps=1000)])
        waited_for(lambda: engine.status().active == 1)
        assert not engine.drain(0.1)
        with pytest.raises(Draining):
            ticket.result(LIMIT)


def test_stopping_leaves_no_thread():
    before = set(threading.enumerate())
    with running() as engine:
        engine.draw(many(2))
    assert set(threading.enumerate()) <= before


def test_ready_after_warm_up_alone():
    with running() as engine:
        assert not engine.status().ready
        engine.warm_up()
        assert engine.status().ready


def test_a_ticket_can_be_waited_for_and_heard_late():
    ticket = Ticket(DrawRequest("red"))
    with pytest.raises(TimeoutError):
        ticket.result(0.01)
    ticket.tell(Words("a"))
    ticket.tell(Finished(text="a"))
    ticket.tell(Words("after the end"))
    heard = []
    ticket.subscribe(heard.append)
    assert heard == [Words("a"), Finished(text="a")]
    assert ticket.done
