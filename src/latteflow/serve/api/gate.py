"""What is refused before a request is routed: foreign hosts and origins, packed bodies, slow and large ones."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latteflow.serve.api.errors import ApiError


class Gate:
    """Middleware that lets through what is addressed to this server, by nobody else's page, with a body that may be.

    A page in a browser may send requests to loopback, and its owner may have its name resolve to loopback as well
    (DNS rebinding). Such requests name the page in ``Origin``, or its name in ``Host``.

    Args:
        app: what is behind it.
        hosts: names a request may be addressed to, beside ``localhost`` and addresses; "*" is any.
        max_body_bytes: the longest body.
        body_seconds: for the body to arrive.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], max_body_bytes: int, body_seconds: float) -> None:
        self.app, self.max_body_bytes, self.body_seconds = app, max_body_bytes, body_seconds
        self.hosts = {host.lower().rstrip(".") for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on with its body bounded."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._refusal(Headers(scope=scope))
        if error is not None:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        named = headers.getlist("host")
        if len(named) != 1 or not self._is_ours(named[0]):
            return ApiError(
                403, "host_not_allowed", "this server does not go by that name: its owner may add it with --allow-host"
            )
        for origin in headers.getlist("origin"):
            if origin.lower().partition("://")[2] != named[0].lower():
                return ApiError(403, "origin_not_allowed", "another site's page may not ask this server")
        if headers.get("content-encoding", "identity").lower() != "identity":
            return ApiError(415, "unsupported_encoding", "send the body as it is, without Content-Encoding")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > self.max_body_bytes:
            return self._too_large()
        return None

    def _is_ours(self, host: str) -> bool:
        name = _without_port(host.lower()).rstrip(".")
        # A name can be made to resolve to anything; an address cannot.
        return name == "localhost" or name in self.hosts or "*" in self.hosts or _is_address(name)

    def _bounded(self, receive: Receive) -> Receive:
        """Return ``receive`` with a bound to the body's bytes and time."""
        deadline, received, whole = anyio.current_time() + self.body_seconds, 0, False

        async def bounded() -> Message:
            nonlocal received, whole
            if whole:  # what is waited for now is the client leaving
                return await receive()
            with anyio.CancelScope(deadline=deadline):
                message = await receive()
                received += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if received > self.max_body_bytes:
                    raise self._too_large()
                return message
            raise ApiError(408, "body_too_slow", f"the body did not arrive within {self.body_seconds:g} s")

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "request_too_large",
            f"a request's body has at most {self.max_body_bytes} bytes",
            headers={"Connection": "close"},
        )


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
