"""Random admissions, cancellations and turns: what is finished equals its solo run, what is given up leaves nothing."""

from functools import cache

import numpy as np
from engine_toys import PROMPTS, alone, double_pipeline, pixels
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from latteflow.serve.engine.engine import Engine
from latteflow.serve.engine.requests import Cancelled, DrawRequest, Failed, Finished
from latteflow.serve.engine.settings import EngineSettings

PATIENCE, MOST_ACTIVE = 3, 5


@cache
def pipeline():
    return double_pipeline()


@cache
def expected(request):
    return alone(pipeline(), request)


class DecodeAtOnce:
    """In place of the decoder's thread, so that turns are all there is."""

    def __init__(self, engine):
        self.engine = engine

    def put(self, ticket, latents):
        self.engine._decoded(ticket, self.engine.pipe.decode(latents)[0])


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        # Not started: turns are the machine's to make.
        self.engine = Engine(pipeline(), EngineSettings(max_batch=3, max_active=MOST_ACTIVE, patience=PATIENCE))
        self.engine._decoding = DecodeAtOnce(self.engine)
        self.tickets, self.given_up = [], set()

    @rule(
        prompt=st.sampled_from(PROMPTS),
        seed=st.integers(0, 3),
        steps=st.integers(1, 4),
        guidance=st.sampled_from((1.0, 3.0)),
        width=st.sampled_from((16, 32)),
    )
    def admit(self, prompt, seed, steps, guidance, width):
        request = DrawRequest(prompt, "", seed, 32, width, steps, guidance)
        self.tickets += self.engine.draw([request])

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data):
        ticket = data.draw(st.sampled_from(self.tickets))
        if not ticket.done:
            ticket.cancel()
            self.given_up.add(ticket)

    @rule(turns=st.integers(1, 4))
    def turn(self, turns):
        for _ in range(turns):
            self.engine._turn()

    @invariant()
    def bounded(self):
        waiting = self.engine._executor._drawings.values()
        assert len(waiting) <= MOST_ACTIVE
        assert all(drawing.passed_over < PATIENCE + MOST_ACTIVE for drawing in waiting)

    def teardown(self):
        while self.engine._turn() or self.engine.status().queued:
            pass
        for ticket in self.tickets:
            if ticket in self.given_up:
                assert isinstance(ticket.last, Failed)
                assert isinstance(ticket.last.error, Cancelled)
            else:
                assert isinstance(ticket.last, Finished)
                assert np.abs(pixels(ticket.last.image) - expected(ticket.request)).max() <= 1
        assert not self.engine._jobs
        assert not len(self.engine._executor)
        assert self.engine._queue.work == 0


Machine.TestCase.settings = settings(max_examples=12, stateful_step_count=14, deadline=None)
TestMachine = Machine.TestCase
