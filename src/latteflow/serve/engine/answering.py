"""Answers in words, one token at a time: transformers' ``generate`` on a thread that works only in its turns.

``generate`` runs to its end once it is called, and pictures would wait for all of it. Here it stops after every token
until the engine gives it the next turn, so exactly one of the two threads computes at any time, and what ``generate``
does remains the library's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TopPLogitsWarper
from transformers.generation.streamers import TextStreamer

from latteflow.errors import UserError
from latteflow.models.answers import generation_settings
from latteflow.models.conversation import ConversationCache
from latteflow.serve.engine.requests import ChatRequest, Failed, Finished, Refused, Ticket, Words


class Answer:
    """One answer under way; only the engine's loop calls its methods.

    Args:
        ticket: who hears of it.
        request: what is to be answered.
        backbone: the model that answers.
        processor: its processor.
    """

    def __init__(self, ticket: Ticket, request: ChatRequest, backbone: Any, processor: Any) -> None:
        self.ticket, self._request = ticket, request
        self._conversation = ConversationCache(backbone, processor)
        self._turns = _Turns()
        self._started_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="latteflow-answer", daemon=True)
        self._thread.start()

    def advance(self) -> bool:
        """Have it go one token further (the first time, the prompt is read as well); return whether there is more."""
        self._turns.give()
        return not self._turns.over

    def give_up(self) -> None:
        """End it after the token it is at."""
        self._turns.stopped = True
        while self.advance():
            pass

    def _run(self) -> None:
        self._turns.wait()
        try:
            if not self._turns.stopped:
                self.ticket.tell(self._answer())
        except (UserError, Refused) as error:
            self.ticket.tell(Failed(error))
        finally:
            self._turns.end()

    def _answer(self) -> Finished:
        request, tokenizer = self._request, self._conversation.processor.tokenizer
        streamer = _Streamer(tokenizer, self.ticket)
        sampling = {} if request.temperature == 0 else {"logits_processor": LogitsProcessorList([_Sample(request)])}
        text = self._conversation.answer(
            request.messages,
            max_new_tokens=request.max_new_tokens,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([self._turns]),
            **sampling,
        )
        ended = streamer.last in _ends(
            generation_settings(self._conversation.backbone, self._conversation.processor, {})
        )
        return Finished(
            text=text,
            finish_reason="stop" if ended else "length",
            prompt_tokens=streamer.prompt_tokens,
            completion_tokens=streamer.tokens,
            seconds_queued=self._started_at - self.ticket.submitted_at,
            seconds=time.monotonic() - self.ticket.submitted_at,
        )


def _ends(settings: dict[str, Any]) -> list[int]:
    ends = settings["eos_token_id"]
    return list(ends) if isinstance(ends, Sequence) else [ends]


class _Turns(StoppingCriteria):
    """A thread that computes only while another waits for it; ``generate`` asks it after every token."""

    def __init__(self) -> None:
        self.stopped = False
        self.over = False
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._theirs.release()
        self.wait()
        return torch.full((len(input_ids),), self.stopped, dtype=torch.bool, device=input_ids.device)

    def wait(self) -> None:
        """In the thread: wait for a turn."""
        self._mine.acquire()

    def end(self) -> None:
        """In the thread: say that no turn will be needed any more."""
        self.over = True
        self._theirs.release()

    def give(self) -> None:
        """From outside: give a turn, and wait until it is used."""
        self._mine.release()
        self._theirs.acquire()


class _Streamer(TextStreamer):
    """Tells a ticket of words as soon as no later token can change them, and counts tokens."""

    def __init__(self, tokenizer: Any, ticket: Ticket) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.prompt_tokens = self.tokens = 0
        self.last = -1
        self._ticket = ticket

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.prompt_tokens = value.shape[-1]
        else:
            self.tokens, self.last = self.tokens + 1, int(value.reshape(-1)[-1])
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._ticket.tell(Words(text))


class _Sample(LogitsProcessor):
    """Makes the greedy choice a sample: temperature and top_p, then Gumbel noise of the request's own seed.

    The largest of logits with Gumbel noise is a sample of their softmax (Gumbel, 1954). transformers' own sampling
    takes torch's one global generator, in which requests would get into each other's numbers.
    """

    def __init__(self, request: ChatRequest) -> None:
        self._temperature = request.temperature
        self._top_p = TopPLogitsWarper(request.top_p) if request.top_p < 1 else None
        self._generator = torch.Generator().manual_seed(request.seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self._temperature
        if self._top_p is not None:
            scores = self._top_p(cast(Any, input_ids), cast(Any, scores))
        uniform = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64)
        return scores - torch.log(-torch.log(uniform)).to(scores)
