"""What clients are answered, in the shapes of OpenAI's, and what is said of errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every error's answer."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request's mistake, or too much of it; Retry-After says when."},
    "5XX": {"model": ErrorBody, "description": "The server's trouble."},
}
"""What every route's description says of errors."""


_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
OR_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}, "description": "With stream, events."}
}
"""What a route's description says, whose answer may be a stream."""


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "warming", "draining", "failed", "hanging"]


class ModelShape(BaseModel):
    """What a page that draws wants to know of a model."""

    size: str
    """WIDTHxHEIGHT of a picture without a size, in pixels."""
    size_multiple: int
    """Widths and heights are its multiples."""
    groups: int
    """Experts."""
    edges: list[float]
    """Of their intervals of t: one more than groups, from 0 (noise) to 1 (data)."""
    weights: dict[str, str]
    """``dtype`` and ``quantize`` where they are not the model's own."""


class ModelObject(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "latteflow"
    latteflow: ModelShape


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ImageData(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int


class TokenDetails(BaseModel):
    """Tokens of an input by kind."""

    image_tokens: int = 0
    text_tokens: int = 0


class ImagesUsage(BaseModel):
    """Tokens read, and tokens drawn."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImagesAnswer(BaseModel):
    """Pictures."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "webp", "jpeg"]
    size: str
    usage: ImagesUsage


class ChatUsage(BaseModel):
    """Tokens read, and tokens said."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerUrl(BaseModel):
    """A picture inside its URL."""

    url: str


class AnswerImage(BaseModel):
    """A drawn picture, as a part that may be sent back in the next request."""

    type: Literal["image_url"] = "image_url"
    image_url: AnswerUrl


class AnswerMessage(BaseModel):
    """The assistant's turn: words, or one picture."""

    role: Literal["assistant"] = "assistant"
    content: str | list[AnswerImage]
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """The assistant's next turn."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
