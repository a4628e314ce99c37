"""The page's side of our HTTP API: requests with the visitor's own key, answers as they come."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx

from latteflow.errors import UserError
from latteflow.serve.page.drawings import Settings
from latteflow.serve.page.strip import Step

_PREVIEWS = 3
_TIMEOUT = httpx.Timeout(10.0, read=600.0)
"""Seconds; an answer may wait long for its turn, and the server has deadlines of its own."""


@dataclass(frozen=True)
class Model:
    """The model that a server offers."""

    name: str
    size: str
    """"WxH" in pixels, its own."""
    size_multiple: int
    """Heights and widths are its multiples."""
    edges: tuple[float, ...]
    """Of the experts' intervals."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """``dtype`` and ``quantize`` where they are not the model's own."""


@dataclass(frozen=True)
class Queued:
    """The drawing waits."""

    ahead: int
    """Drawings before it."""


@dataclass(frozen=True)
class Preview:
    """The picture as it is expected to become."""

    image: bytes


@dataclass(frozen=True)
class Drawn:
    """The finished picture: a PNG with its record in it."""

    image: bytes


DrawEvent: TypeAlias = Queued | Step | Preview | Drawn


class ServerTrouble(UserError):
    """The server did not do what the page asked; the message is for the visitor."""


class ApiClient:
    """A client of our API.

    Args:
        address: such as ``http://127.0.0.1:8000``.
        key: the visitor's, where they gave one.
    """

    def __init__(self, address: str, key: str | None = None) -> None:
        self.address = address
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def model(self) -> Model:
        """Return the served model.

        Raises:
            ServerTrouble: it does not say.
        """
        async with self._open("GET", "/v1/models", None) as answer:
            listed = json.loads(await answer.aread())["data"][0]
        shape = listed["latteflow"]
        return Model(listed["id"], shape["size"], shape["size_multiple"], tuple(shape["edges"]), shape["weights"])

    async def draw(self, settings: Settings, model: str) -> AsyncGenerator[DrawEvent, None]:
        """Have a picture drawn, and tell of every step; closing the iterator gives the drawing up.

        Raises:
            ServerTrouble: the server refused, failed or went away.
        """
        body = settings.body(model) | {"stream": True, "partial_images": _PREVIEWS, "progress": True}
        async with self._open("POST", "/v1/images/generations", body) as answer:
            async for event in _events(answer):
                match event.get("type"):
                    case "image_generation.queued":
                        yield Queued(event["latteflow"]["ahead"])
                    case "image_generation.progress":
                        told = event["latteflow"]
                        yield Step(**{name: told[name] for name in ("step", "steps", "group", "t", "seconds", "batch")})
                    case "image_generation.partial_image":
                        yield Preview(_bytes(event["b64_json"]))
                    case "image_generation.completed":
                        yield Drawn(_bytes(event["b64_json"]))
                        return
        raise ServerTrouble("the server ended the drawing without a picture: try again")

    async def ask(self, messages: Sequence[dict[str, Any]], model: str) -> AsyncGenerator[str, None]:
        """Have a conversation answered, and return the words as they come.

        Raises:
            ServerTrouble: the server refused, failed or went away.
        """
        body = {"model": model, "messages": list(messages), "stream": True}
        async with self._open("POST", "/v1/chat/completions", body) as answer:
            async for chunk in _events(answer):
                for choice in chunk.get("choices", []):
                    if choice["delta"].get("content"):
                        yield choice["delta"]["content"]

    @asynccontextmanager
    async def _open(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[httpx.Response]:
        try:
            # The environment's proxies are not for a server's talk with itself.
            async with (
                httpx.AsyncClient(base_url=self.address, timeout=_TIMEOUT, trust_env=False) as http,
                http.stream(method, path, json=body, headers=self._headers) as answer,
            ):
                if answer.status_code != httpx.codes.OK:
                    raise _trouble(await answer.aread())
                yield answer
        except httpx.HTTPError as error:
            raise ServerTrouble("the server does not answer: it may be starting or stopping; try again") from error


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Return the JSON objects of a stream of server-sent events."""
    async for line in answer.aiter_lines():
        kind, _, data = line.partition(":")
        if kind != "data" or data.strip() == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise _trouble(data.encode())
        yield event


def _trouble(body: bytes) -> ServerTrouble:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = "the server answered what this page does not understand: try again"
    return ServerTrouble(message)


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ServerTrouble("the server sent a broken picture: try again") from error
