"""What clients may ask, field by field.

Requests are strict: no other fields, no numbers as strings, no booleans or NaN as numbers. Fields of OpenAI's that mean
nothing here are taken, and named in a header of the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from typing_extensions import Self

MOST_PICTURES = 10
MOST_STEPS = 1000
_LONGEST_PROMPT = 8_000
_LONGEST_TEXT = 32_000
_MOST_MESSAGES = 128
_MOST_PARTS = 32
_LONGEST_NAME = 200
_NO_EFFECT = "Taken for OpenAI's clients; has no effect here."

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=_LONGEST_PROMPT, pattern=r"\S")]
Seed = Annotated[int, Field(ge=0, lt=2**63 - MOST_PICTURES)]
Ignored = Annotated[Any, Field(description=_NO_EFFECT)]


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def ignored(self) -> list[str]:
        """Return the fields that were given and have no effect."""
        given = sorted(name for name in self.model_fields_set if getattr(self, name) is not None)
        return [name for name in given if type(self).model_fields[name].description == _NO_EFFECT]


class Drawing(Body):
    """How a picture is drawn; shared by both endpoints that draw."""

    size: Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = Field(
        None, description="WIDTHxHEIGHT in pixels, or auto: the model's own."
    )
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of WebP and JPEG, in percent."
    )
    seed: Seed | None = Field(None, description="Picture i is drawn from seed + i; left out, by chance.")
    num_inference_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = Field(None, description="Short for num_inference_steps.")
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        None, description="Short for guidance_scale."
    )
    negative_prompt: Annotated[str, StringConstraints(max_length=_LONGEST_PROMPT)] | None = None
    timeout: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] | None = Field(
        None, description="Seconds; what is not finished by then is given up."
    )

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        for name, short in (("num_inference_steps", "steps"), ("guidance_scale", "guidance")):
            if getattr(self, name) is not None and getattr(self, short) is not None:
                raise ValueError(f"give {name} or {short}, not both")
        return self

    @property
    def number_of_steps(self) -> int:
        """Steps of the solver."""
        return self.num_inference_steps or self.steps or 40

    @property
    def scale(self) -> float:
        """The guidance scale."""
        given = self.guidance_scale if self.guidance_scale is not None else self.guidance
        return 4.0 if given is None else given


class ImageBody(Drawing):
    """A request for pictures."""

    prompt: Prompt
    model: Annotated[str, StringConstraints(max_length=_LONGEST_NAME)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    response_format: Literal["b64_json", "url"] | None = Field(None, description="url: a data: URL with the picture.")
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    progress: bool | None = Field(None, description="With stream: an event a step, saying which expert ran.")
    background: Ignored = None
    complexity: Ignored = None
    frame_count: Ignored = None
    frame_duration_ms: Ignored = None
    moderation: Ignored = None
    quality: Ignored = None
    safety_identifier: Ignored = None
    style: Ignored = None
    svg: Ignored = None
    user: Ignored = None

    @model_validator(mode="after")
    def _streams_or_not(self) -> Self:
        if self.stream and self.n not in (None, 1):
            raise ValueError("a stream holds one picture: leave n out, or ask several times")
        if not self.stream and (self.partial_images or self.progress):
            raise ValueError("partial_images and progress need stream")
        return self


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Part):
    """Words of a message."""

    type: Literal["text"]
    text: Annotated[str, StringConstraints(max_length=_LONGEST_TEXT)]


class ImageUrl(_Part):
    """Where a picture is: inside the URL itself, unless the server allows domains."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Part):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Part):
    """A turn. What OpenAI's clients send back of an answer's other fields has to be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[str, StringConstraints(max_length=_LONGEST_TEXT)]
        | Annotated[list[Part], Field(min_length=1, max_length=_MOST_PARTS)]
    )
    name: Annotated[str, StringConstraints(max_length=_LONGEST_NAME)] | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def texts(self) -> list[str]:
        """Return the words, a string a part."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content if isinstance(part, TextPart)]


class StreamOptions(_Part):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatBody(Drawing):
    """A request for the assistant's next turn: words, or with ``modalities: ["image"]`` a picture."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MOST_MESSAGES)]
    model: Annotated[str, StringConstraints(max_length=_LONGEST_NAME)] | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=1)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(
        None, description="Left out, 0: greedy."
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Any = Field(None, description="Refused: cut the answer where you like.")
    audio: Ignored = None
    frequency_penalty: Ignored = None
    function_call: Ignored = None
    functions: Ignored = None
    logit_bias: Ignored = None
    logprobs: Ignored = None
    metadata: Ignored = None
    moderation: Ignored = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None
    presence_penalty: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning_effort: Ignored = None
    response_format: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    tool_choice: Ignored = None
    tools: Ignored = None
    top_logprobs: Ignored = None
    user: Ignored = None
    verbosity: Ignored = None
    web_search_options: Ignored = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("a conversation has to end with a user's message")
        if self.stop:
            raise ValueError("stop is not supported: cut the answer where you like")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        if sum(len(text) for message in self.messages for text in message.texts()) > _LONGEST_TEXT:
            raise ValueError(f"the messages hold more than {_LONGEST_TEXT} characters together")
        drawing = set(Drawing.model_fields) - {"seed", "timeout"}
        given = sorted(name for name in drawing & self.model_fields_set if getattr(self, name) is not None)
        if given and not self.draws:
            raise ValueError(f"{given[0]} needs modalities ['image']")
        return self

    @property
    def draws(self) -> bool:
        """Whether a picture is wanted."""
        return self.modalities == ["image"]
