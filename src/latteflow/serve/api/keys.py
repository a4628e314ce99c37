"""API keys: read once, kept as digests, compared in constant time, asked for before a request's body is read."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from latteflow.errors import UserError
from latteflow.serve.api.errors import ApiError

_SHORTEST = 16
KEYS_VARIABLE = "LATTEFLOW_API_KEYS"
"""The environment variable that may hold keys, with commas between them."""


class ApiKeys:
    """A set of keys, of which only SHA-256 digests are kept.

    Args:
        keys: of 16 characters or more each; none lets everybody in.

    Raises:
        UserError: a key is too short to be safe, or holds what no header can.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        keys = list(keys)
        for number, key in enumerate(keys, 1):
            if len(key) < _SHORTEST or not key.isascii() or not key.isprintable():
                raise UserError(
                    f"API key {number} does not do: give {_SHORTEST} or more printable ASCII characters, such as "
                    "python -c 'import secrets; print(secrets.token_urlsafe(32))' prints"
                )
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def read(cls, file: Path | None, variable: str | None) -> ApiKeys:
        """Return the keys of a file and of an environment variable's value.

        Args:
            file: a key a line; empty lines and lines that begin with # are passed over.
            variable: keys with commas or white space between.

        Raises:
            UserError: the file cannot be read or holds no key, or a key does not do.
        """
        keys = (variable or "").replace(",", " ").split()
        if file is not None:
            try:
                lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--api-key-file {file} cannot be read: give a text file, a key a line") from error
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                raise UserError(f"--api-key-file {file} holds no key: write one a line")
            keys += found
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, authorization: str | None) -> bool:
        """Return whether an ``Authorization`` header brings one of the keys, or none is asked for."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        found = False
        for digest in self._digests:  # all of them, so that the time says nothing of which one it was
            found |= hmac.compare_digest(given, digest)
        return found


class KeyedRoute(APIRoute):
    """A route that asks for a key, and for JSON, before the body is read, and wherever in the path tree it is mounted.

    A page of another site cannot have a browser send JSON without asking first.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the route's handler behind the check.

        Raises:
            ApiError: from the handler: 401 where no valid key is given, 415 where the body is not said to be JSON.
        """
        handler = super().get_route_handler()

        async def keyed(request: Request) -> Response:
            keys: ApiKeys = request.app.state.service.settings.keys
            if not keys.accepts(request.headers.get("authorization")):
                raise ApiError(
                    401,
                    "invalid_api_key",
                    "give a valid API key in the header 'Authorization: Bearer KEY'",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(415, "unsupported_media_type", "send JSON, with Content-Type: application/json")
            return await handler(request)

        return keyed


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
