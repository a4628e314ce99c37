"""Who asks the page, and by what way the page asks the server for them: with their own key, at its own address."""

from __future__ import annotations

import base64
import binascii

import gradio as gr
from starlette.requests import Request

from latteflow.serve.page.client import ApiClient


def bearer(authorization: str | None) -> str | None:
    """Return the key that an ``Authorization`` header brings, or None.

    Browsers ask for a name and a password ("Basic"): the key is the password, and the name may be anything.
    """
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return given.strip() or None
    if scheme.lower() != "basic":
        return None
    try:
        decoded = base64.b64decode(given.strip(), validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return decoded.partition(":")[2] or None


def client_of(event: gr.Request) -> ApiClient:
    """Return a client of the server that the visitor's request came to.

    The address is that of the socket that took the request, never one that the visitor named.
    """
    request = _request(event)
    host, port = request.scope["server"]
    return ApiClient(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", _key(request))


def public_address(event: gr.Request) -> str:
    """Return the address that the visitor knows the server by."""
    return str(_request(event).base_url).rstrip("/")


def is_keyed(event: gr.Request) -> bool:
    """Return whether the visitor gave a key."""
    return _key(_request(event)) is not None


def _key(request: Request) -> str | None:
    return bearer(request.headers.get("authorization"))


def _request(event: gr.Request) -> Request:
    if event.request is None:
        raise RuntimeError("Gradio handed over no request")
    return event.request
