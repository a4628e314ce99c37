"""``POST /v1/chat/completions``: words, or the next turn as a picture."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from latteflow.models.processor import Message
from latteflow.serve.api.answers import (
    ERRORS,
    OR_STREAM,
    AnswerImage,
    AnswerMessage,
    AnswerUrl,
    ChatAnswer,
    ChatUsage,
    Choice,
)
from latteflow.serve.api.drawing import draw_requests, picture_tokens
from latteflow.serve.api.encoding import data_url, encode_picture, record_of
from latteflow.serve.api.keys import KeyedRoute
from latteflow.serve.api.pictures import PictureReader
from latteflow.serve.api.schemas import ChatBody, ImagePart
from latteflow.serve.api.service import Service, ServiceOf, ignored_header
from latteflow.serve.api.tickets import HEARTBEAT, EventStream, events, finished, server_event
from latteflow.serve.engine.requests import ChatRequest, DrawRequest, Finished, Ticket, Words

router = APIRouter(prefix="/v1/chat", tags=["chat"], route_class=KeyedRoute, responses=ERRORS)
_MOST_WORDS = 512
_ROLES = {"developer": "system"}


@dataclass(frozen=True)
class _Turn:
    """A request under way, and what every piece of its answer repeats."""

    body: ChatBody
    asked: ChatRequest | DrawRequest
    service: Service
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def content(self, end: Finished) -> str | list[AnswerImage]:
        """Return the answer's content."""
        if end.image is None or not isinstance(self.asked, DrawRequest):
            return end.text or ""
        kind, settings = self.body.output_format or "png", self.service.settings
        record = record_of(self.asked, " ".join(self.body.messages[-1].texts()), settings.model, settings.weights)
        text = await anyio.to_thread.run_sync(encode_picture, end.image, kind, self.body.output_compression, record)
        return [AnswerImage(image_url=AnswerUrl(url=data_url(text, kind)))]

    def usage(self, end: Finished) -> ChatUsage:
        """Return what was read and said, in tokens; a picture's tokens are what was said."""
        said = end.completion_tokens
        if isinstance(self.asked, DrawRequest):
            said = picture_tokens(self.service, self.asked.width or 0, self.asked.height or 0)
        return ChatUsage(prompt_tokens=end.prompt_tokens, completion_tokens=said, total_tokens=end.prompt_tokens + said)


@router.post("/completions", response_model=ChatAnswer, responses=OR_STREAM)
async def complete(request: Request, body: ChatBody, service: ServiceOf) -> Response:
    """Answer a conversation."""
    service.take(body.model)
    if service.settings.log_prompts:
        request.state.prompt = [message.texts() for message in body.messages]
    messages = await _messages(body, service)
    asked = _asked(body, messages, service)
    turn = _Turn(body, asked, service)
    engine = service.engine
    ticket = engine.draw([asked])[0] if isinstance(asked, DrawRequest) else engine.chat(asked)
    if body.stream:
        return EventStream(_frames(turn, ticket), ticket, ignored_header(body), service.settings.send_seconds)
    [end] = await finished(request, [ticket])
    answer = ChatAnswer(
        id=turn.id,
        created=turn.created,
        model=service.settings.model,
        choices=[Choice(message=AnswerMessage(content=await turn.content(end)), finish_reason=_reason(end))],
        usage=turn.usage(end),
    )
    return JSONResponse(answer.model_dump(), headers=ignored_header(body))


async def _messages(body: ChatBody, service: Service) -> list[Message]:
    """Return the conversation as the pipeline takes it, its pictures decoded."""
    settings = service.settings
    reader = PictureReader(settings.pictures, settings.image_domains, service.decoders)
    messages = []
    for message in body.messages:
        content: Any = message.content
        if not isinstance(content, str):
            content = [
                {"type": "image", "image": await reader.read(part.image_url.url)}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": part.text}
                for part in content
            ]
        messages.append({"role": _ROLES.get(message.role, message.role), "content": content})
    return messages


def _asked(body: ChatBody, messages: Sequence[Message], service: Service) -> ChatRequest | DrawRequest:
    if body.draws:
        return draw_requests(body, messages, service)[0]
    return ChatRequest(
        messages=messages,
        max_new_tokens=body.max_completion_tokens or body.max_tokens or _MOST_WORDS,
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=body.seed or 0,
        timeout=body.timeout,
    )


async def _frames(turn: _Turn, ticket: Ticket) -> AsyncIterator[str]:
    """Yield an answer's chunks."""
    yield _chunk(turn, {"role": "assistant", "content": ""})
    async for event in events(ticket):
        match event:
            case None:
                yield HEARTBEAT
            case Words():
                yield _chunk(turn, {"content": event.text})
            case Finished():
                if event.image is not None:
                    yield _chunk(turn, {"content": [part.model_dump() for part in await turn.content(event)]})
                yield _chunk(turn, {}, reason=_reason(event))
                if turn.body.stream_options is not None and turn.body.stream_options.include_usage:
                    yield _chunk(turn, None, usage=turn.usage(event).model_dump())
    yield server_event("[DONE]")


def _chunk(
    turn: _Turn, delta: dict[str, Any] | None, *, reason: str | None = None, usage: dict[str, Any] | None = None
) -> str:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
    chunk = {
        "id": turn.id,
        "object": "chat.completion.chunk",
        "created": turn.created,
        "model": turn.service.settings.model,
        "choices": choices,
    }
    return server_event(chunk if usage is None else {**chunk, "usage": usage})


def _reason(end: Finished) -> Any:
    return "length" if end.finish_reason == "length" else "stop"
