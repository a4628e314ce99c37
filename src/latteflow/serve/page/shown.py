"""HTML of what the draw tab shows. Whatever a visitor or a picture's file said is escaped here."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

from PIL import Image

from latteflow.serve.page.drawings import Settings

_THUMBNAIL = 128

STYLE = """
#picture {display: grid; place-items: center; min-height: 20rem; background: white; border-radius: 8px;
  border: 1px solid var(--border-color-primary); color: #555;}
#picture > div, #picture > div > div {width: 100%; display: grid; place-items: center;}
#picture img {width: min(100%, 24rem); image-rendering: pixelated;}
#picture a {font-size: 0.9rem; color: #1d4ed8; text-decoration: underline;}
#status, #chat-status {min-height: 1.6rem;}
#status .trouble, #chat-status .trouble {color: var(--error-text-color, #b91c1c); font-weight: 600;}
#gallery .drawings {display: grid; grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); gap: 0.5rem;}
#gallery button {padding: 0; border: 2px solid transparent; border-radius: 8px; overflow: hidden; background: white;
  aspect-ratio: 1; cursor: pointer;}
#gallery button img {width: 100%; height: 100%; object-fit: contain; display: block;}
#gallery button[aria-pressed="true"] {border-color: var(--color-accent);}
#gallery button:focus-visible {outline: 3px solid var(--color-accent); outline-offset: 2px;}
#conversation .message img {margin: 0 0 0.4rem; width: min(100%, 12rem); image-rendering: pixelated; background: white;
  border-radius: 6px;}
#details table {width: 100%; border-collapse: collapse;}
#details th, #details td {text-align: left; padding: 0.2rem 0.6rem 0.2rem 0; vertical-align: top;
  overflow-wrap: anywhere;}
#details th {font-weight: 600; width: 9rem; text-transform: capitalize;}
"""
"""CSS of all of it."""


@dataclass(frozen=True)
class Drawing:
    """A finished drawing."""

    settings: Settings
    image: bytes
    """A PNG."""


def picture(image: bytes, settings: Settings, *, finished: bool) -> str:
    """Return a picture of that prompt, and a link to keep it by once it is finished."""
    address = _address(image, "png" if image.startswith(b"\x89PNG") else "jpeg")
    shown = f'<img src="{address}" alt="{escape(settings.prompt)}">'
    if not finished:
        return shown
    name = re.sub(r"[^A-Za-z0-9]+", "-", settings.prompt).strip("-")[:60] or "picture"
    return f'{shown}<a href="{address}" download="{name}-{settings.seed}.png">Download PNG</a>'


def status(words: str) -> str:
    """Return how things stand."""
    return f'<p role="status">{escape(words)}</p>'


def trouble(words: str) -> str:
    """Return what went wrong."""
    return f'<p role="alert" class="trouble">{escape(words)}</p>'


def gallery(drawings: Sequence[Drawing], chosen: int | None) -> str:
    """Return all drawings as buttons, the newest first; a button's ``data-index`` is the drawing's place."""
    buttons = [
        f'<button type="button" data-index="{i}" aria-pressed="{"true" if i == chosen else "false"}" '
        f'title="{escape(_words(drawing.settings))}">'
        f'<img src="{_address(_thumbnail(drawing.image), "png")}" alt="{escape(_words(drawing.settings))}"></button>'
        for i, drawing in reversed(list(enumerate(drawings)))
    ]
    return f'<div class="drawings">{"".join(buttons)}</div>' if buttons else ""


GALLERY_SCRIPT = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-index]');
  if (button) trigger('select', {index: Number(button.dataset.index), value: null});
});
"""
"""What a click on a button of the gallery does."""


def details(settings: Settings) -> str:
    """Return a drawing's settings as a table."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in settings.rows())
    return f"<table>{rows}</table>"


def _words(settings: Settings) -> str:
    return f"{settings.prompt}, seed {settings.seed}"


def _thumbnail(image: bytes) -> bytes:
    with Image.open(BytesIO(image)) as opened:
        small = opened.convert("RGB")
    if max(small.size) <= _THUMBNAIL:
        return image
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = BytesIO()
    small.save(buffer, format="PNG")
    return buffer.getvalue()


def _address(image: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
