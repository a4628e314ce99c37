"""The group pipeline's router, with stages in this process: pictures keep their bits, whatever dies when."""

import pytest
import torch
from engine_toys import PROMPTS, alone, pixels, running
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_toys import AT_ONCE, CPU, FakePipeline, FakeStage, drawing, drawn, locally, pipe_of

from latteflow.errors import UserError
from latteflow.serve.engine.executor import Lost, Stepped
from latteflow.serve.engine.requests import DrawRequest, EngineFailed, OutOfMemory
from latteflow.serve.engine.settings import EngineSettings
from latteflow.serve.executors.codec import Admit, CodecError, Dropped, Enter, Moved, Packet, Refusal
from latteflow.serve.executors.group_pipeline import Patience
from latteflow.serve.executors.stage import StageWorker
from latteflow.serve.executors.stage_process import Report

PLAIN = EngineSettings()
PADDED = EngineSettings(max_batch=3, deterministic=True)


def same(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[id], other[id]) for id in one)


def told(outcomes):
    """What an engine passes on of each step, without seconds and batches."""
    return sorted((each.id, each.step, each.steps, each.group, each.t, each.clean is None) for each in outcomes)


@pytest.mark.parametrize("steps", [1, 3, 6, 9])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_one_picture_has_the_bits_of_one_process(steps, scale):
    pipe = pipe_of()
    pictures = [[drawing(1, pipe, steps=steps, scale=scale, preview_every=2)] for _ in range(2)]
    expected, steps_expected = locally(pictures[0], pipe, PLAIN)
    found, steps_found = drawn(FakePipeline(pipe, PLAIN), pictures[1])
    assert same(found, expected)
    assert told(steps_found) == told(steps_expected)
    cleans = [[each.clean for each in outcomes if each.clean is not None] for outcomes in (steps_found, steps_expected)]
    assert len(cleans[0]) == steps // 2
    assert all(torch.equal(*both) for both in zip(*cleans, strict=True))


def test_several_have_the_bits_of_one_process_where_forwards_are_padded():
    pipe = pipe_of()
    found, outcomes = drawn(FakePipeline(pipe, PADDED), several(pipe))
    assert same(found, locally(several(pipe), pipe, PADDED)[0])
    assert max(outcome.batch for outcome in outcomes) == 3


def several(pipe, number=5):
    return [drawing(i, pipe, steps=3 + i, scale=(4.0, 1.0)[i % 2]) for i in range(number)]


def test_only_latents_cross_a_border():
    pipe = pipe_of()
    pipeline = FakePipeline(pipe, PLAIN)
    heard = {group: [] for group in pipeline.stages}
    for group, stage in pipeline.stages.items():
        stage.send = lambda packet, group=group, send=stage.send: (heard[group].append(packet), send(packet))
    drawn(pipeline, [drawing(0, pipe, steps=8)])
    for group, packets in heard.items():
        assert [type(packet.message) for packet in packets] == [Admit, Enter]
        assert set(packets[1].tensors) == {"x_t"}
        numbers = pipe.transformer.layers_of(group)
        assert packets[0].message.first_layer == numbers.start
        assert packets[0].tensors["conditional.keys"].shape[1] == len(numbers)
        # What stays in a stage says nothing of latents, until the picture leaves it.
        said = [packet for packet in pipeline.stages[group].said if isinstance(packet.message, Moved)]
        assert ["x_t" in packet.tensors for packet in said] == [False, True]


def test_a_stage_without_a_step_of_the_picture_hears_nothing_of_it():
    pipe = pipe_of()
    pipeline = FakePipeline(pipe, PLAIN)
    pipeline.add(drawing(0, pipe, steps=2))  # at t = 0 and 0.5
    assert [bool(pipeline.stages[group].heard) for group in range(4)] == [True, False, True, False]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_stages_may_die_at_any_moment(data):
    pipe = pipe_of()
    expected, steps_expected = locally(several(pipe, 4), pipe, PADDED)
    pipeline, waiting = FakePipeline(pipe, PADDED), several(pipe, 4)
    outcomes = []
    events = data.draw(st.lists(st.sampled_from(["advance", "advance", "add", "work", "die"]), max_size=60))
    for event in events:
        stage = pipeline.stages[data.draw(st.integers(0, 3))]
        if event == "add" and waiting:
            pipeline.add(waiting.pop())
        elif event == "work":
            stage.work()
        elif event == "die":
            stage.die()
        else:
            outcomes += pipeline.advance()
    for picture in waiting:
        pipeline.add(picture)
    for _ in range(100):
        outcomes += pipeline.advance()
        if not pipeline._pictures and pipeline.trouble() is None:
            break
    found = {outcome.id: outcome.x_1 for outcome in outcomes if outcome.x_1 is not None}
    assert same(found, expected)
    assert told(outcomes) == told(steps_expected)  # every step once, replayed or not
    assert pipeline.trouble() is None


def test_a_silent_stage_is_replaced():
    pipe = pipe_of()
    pipeline = FakePipeline(pipe, PLAIN, Patience(silence=5, backoff=0))
    pipeline.add(drawing(0, pipe))
    silent = pipeline.stages[0]
    silent.work, silent.silent_for = lambda: None, 4.9
    pipeline.advance()
    assert silent.alive
    silent.silent_for = 5.1
    pipeline.advance()
    assert not silent.alive
    found = {}
    for _ in range(50):
        found |= {outcome.id: outcome.x_1 for outcome in pipeline.advance() if outcome.x_1 is not None}
    assert pipeline.stages[0] is not silent
    assert pipeline.restarts == 1
    assert same(found, locally([drawing(0, pipe)], pipe, PLAIN)[0])


def test_a_stage_is_started_again_after_a_while_and_meanwhile_there_is_trouble():
    pipeline = FakePipeline(pipe_of(), PLAIN, Patience(backoff=3600))
    assert pipeline.trouble() is None
    pipeline.stages[2].die()
    for _ in range(3):
        pipeline.advance()
    assert pipeline.trouble() == "stages 2 are being started"
    assert len(pipeline.started) == 4
    pipeline._slots[2].start_at = 0
    pipeline.advance()
    assert pipeline.trouble() is None
    assert (len(pipeline.started), pipeline.restarts) == (5, 1)


def test_stages_that_die_again_and_again_are_the_end():
    pipe = pipe_of()
    pipeline = FakePipeline(pipe, PLAIN, Patience(deaths=3, backoff=0))
    pipeline.add(drawing(0, pipe, steps=20))
    pipeline.add(drawing(1, pipe, steps=20))
    for _ in range(2):
        pipeline.stages[3].die()
        assert all(isinstance(outcome, Stepped) for outcome in pipeline.advance() + pipeline.advance())
    pipeline.stages[3].die()
    lost = pipeline.advance()
    assert {(type(outcome), outcome.id, type(outcome.error)) for outcome in lost if isinstance(outcome, Lost)} == {
        (Lost, f"picture {number}", EngineFailed) for number in range(2)
    }
    with pytest.raises(EngineFailed, match="group 3"):
        pipeline.advance()
    assert "group 3" in pipeline.trouble()
    assert not any(stage.alive for stage in pipeline.started)


def test_a_stage_that_cannot_be_started_yet_is_started_later():
    pipeline = FakePipeline(pipe_of(), PLAIN)
    start, refusals = pipeline._start, [OSError(12, "Cannot allocate memory")] * 3

    def short_of_memory(group, inbox):
        if refusals:
            raise refusals.pop()
        return start(group, inbox)

    pipeline._start = short_of_memory
    pipeline.stages[1].die()
    for _ in range(6):
        assert pipeline.advance() == []
    assert pipeline.trouble() is None
    assert pipeline.restarts == 4


def test_deaths_long_ago_are_forgotten():
    pipeline = FakePipeline(pipe_of(), PLAIN, Patience(deaths=2, window=0, backoff=0))
    for _ in range(5):
        pipeline.stages[3].die()
        pipeline.advance()
        pipeline.advance()
    assert pipeline.trouble() is None


def test_what_was_given_up_is_not_heard_of_again():
    pipe = pipe_of()
    pipeline = FakePipeline(pipe, PLAIN)
    pipeline.add(drawing(0, pipe))
    pipeline.advance()
    for stage in pipeline.stages.values():
        stage.work()  # and what it says comes after
    pipeline.remove("picture 0")
    pipeline.remove("picture 0")
    assert [pipeline.advance() for _ in range(9)] == [[]] * 9
    assert not any(stage._worker.busy or stage._worker._admitted for stage in pipeline.stages.values())


def test_a_picture_that_memory_does_not_suffice_for_is_lost_alone():
    pipe = pipe_of()
    pipeline = FakePipeline(pipe, PLAIN)
    pipeline.add(drawing(0, pipe))
    stage = pipeline.stages[0]
    pipeline._inbox.put(Report(stage, Packet(Dropped(id="picture 0", message="draw smaller"))))
    [lost] = pipeline.advance()
    assert isinstance(lost.error, OutOfMemory)
    assert str(lost.error) == "draw smaller"
    assert same(drawn(pipeline, [drawing(1, pipe)])[0], locally([drawing(1, pipe)], pipe, PLAIN)[0])


@pytest.mark.parametrize(
    ("group", "fields", "tensors"),
    [
        (0, {"step": 7}, {}),
        (0, {"step": 0}, {}),
        (1, {"step": 1}, {}),
        (1, {"step": 2}, {}),
        (0, {"step": 1}, {"x_t": torch.zeros(1, 4, 4, 4)}),
        (0, {"step": 2}, {}),
        (0, {"step": 2}, {"x_t": torch.zeros(1, 4, 4, 5)}),
    ],
)
def test_a_stage_that_says_what_cannot_be_is_replaced(group, fields, tensors):
    pipe = pipe_of()
    pipeline = FakePipeline(pipe, PLAIN)
    pipeline.add(drawing(0, pipe))
    moved = Moved(id="picture 0", t=0.0, seconds=0.0, batch=1, **fields)
    liar = pipeline.stages[group]
    pipeline._inbox.put(Report(liar, Packet(moved, tensors)))
    found = {}
    for _ in range(30):
        found |= {outcome.id: outcome.x_1 for outcome in pipeline.advance() if outcome.x_1 is not None}
    assert (liar.alive, pipeline.restarts) == (False, 1)
    assert same(found, locally([drawing(0, pipe)], pipe, PLAIN)[0])


def test_a_stage_refuses_what_makes_no_sense():
    pipe = pipe_of()
    worker = StageWorker(pipe.transformer, 1, pipe.scheduler, PLAIN, CPU)
    pipeline = FakePipeline(pipe, PLAIN)
    heard = []
    pipeline.stages[1].send = heard.append
    pipeline.add(drawing(0, pipe, steps=8))
    [admit] = heard
    x_t = {"x_t": torch.zeros(1, 4, 4, 4)}
    with pytest.raises(CodecError, match="not admitted"):
        worker.take(Packet(Enter(id="picture 0", step=2), x_t))
    worker.take(admit)
    for step in (1, 4, 8):
        with pytest.raises(CodecError, match="another group"):
            worker.take(Packet(Enter(id="picture 0", step=step), x_t))
    with pytest.raises(CodecError, match="another group"):
        worker.take(admit._replace(message=admit.message.model_copy(update={"first_layer": 0})))
    with pytest.raises(CodecError, match="without a context"):
        worker.take(Packet(admit.message))
    with pytest.raises(CodecError, match="nothing that a stage is told"):
        worker.take(Packet(Refusal(message="")))


def test_a_refusal_is_the_users_to_mend():
    with pytest.raises(UserError, match="no device 'tpu'"):
        FakePipeline(pipe_of(), PLAIN, AT_ONCE, Packet(Refusal(message="there is no device 'tpu' here")))


def test_stages_measure_what_they_cost_one_after_the_other():
    pipeline = FakePipeline(pipe_of(), PLAIN)
    work, busy = FakeStage.work, []

    def dying(stage):
        busy.append([each.group for each in pipeline.stages.values() if each.heard])
        if stage.group == 2 and stage.heard and pipeline.restarts == 0:
            stage.die()
        work(stage)

    for stage in pipeline.started:
        stage.work = lambda stage=stage: dying(stage)
    costs = pipeline.measure()
    assert len(costs) == 4
    assert all(cost.seconds(1) > 0 for cost in costs)
    assert pipeline.restarts == 1
    assert max(map(len, busy)) == 1


def test_an_engine_draws_with_it_and_says_when_it_is_not_ready():
    pipe = pipe_of()
    pipeline = FakePipeline(pipe, PLAIN, Patience(backoff=3600))
    requests = [DrawRequest(PROMPTS[i], seed=i, num_inference_steps=5) for i in range(3)]
    with running(pipe, executor=pipeline) as engine:
        engine.warm_up()
        drawn = [pixels(ticket.result(60).image) for ticket in engine.draw(requests)]
        assert engine.status().ready
        pipeline.stages[1].die()
        ticket = engine.draw([requests[0]])[0]
        with pytest.raises(TimeoutError):
            ticket.result(1.0)
        assert not engine.status().ready
        assert engine.status().failed is None
        pipeline._slots[1].start_at = 0
        again = pixels(ticket.result(60).image)
        assert engine.status().ready
    for request, picture in zip(requests, drawn, strict=True):
        assert abs(picture - alone(pipe, request)).max() <= 1
    assert (again == drawn[0]).all()
    assert all(stage.ended for stage in pipeline.started if stage.alive)
