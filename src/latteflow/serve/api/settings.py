"""How the API is set up: its name for the model, who may ask, and the bounds of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from latteflow.serve.api.keys import ApiKeys

MIB = 1 << 20


@dataclass(frozen=True)
class PictureLimits:
    """Bounds of the pictures that a request brings along."""

    count: int = 8
    """Pictures a request."""
    total_bytes: int = 16 * MIB
    """Of their files, together."""
    total_pixels: int = 32_000_000
    """Of all of them, as decoded."""
    seconds: float = 10.0
    """To fetch one, and to decode one."""


@dataclass(frozen=True)
class ServerSettings:
    """Everything about the API that is not the engine's."""

    model: str = "emoji-64"
    """What clients call the model."""
    weights: Mapping[str, object] = field(default_factory=dict)
    """What a picture's record says of the weights, such as ``{"dtype": "bfloat16"}``."""
    keys: ApiKeys = field(default_factory=ApiKeys)
    """Who may ask; without keys, everybody."""
    hosts: frozenset[str] = frozenset()
    """Names that requests may be addressed to, beside ``localhost`` and addresses; "*" is any."""
    image_domains: frozenset[str] = frozenset()
    """Hosts, or ``host:port``, that pictures are fetched from; none by default."""
    pictures: PictureLimits = field(default_factory=PictureLimits)
    max_body_bytes: int = 24 * MIB
    """Of a request: room for the pictures in base64, and words."""
    body_seconds: float = 30.0
    """For a request's body to arrive."""
    send_seconds: float = 60.0
    """For a client to take the next piece of an answer."""
    max_silence: float = 60.0
    """Seconds after which an engine that does not go around its loop counts as hanging."""
    log_prompts: bool = False
    """Whether the log says what was asked."""
