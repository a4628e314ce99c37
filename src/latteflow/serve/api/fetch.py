"""Pictures from the web, where the operator allows a domain: the one place of this package that calls out.

What is checked is what is connected to: a name is resolved once, every address of it has to be public, and the
connection goes to that address. There are no redirects, no proxies, and bounds to bytes; the caller bounds the time.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Collection
from typing import Any

import anyio
import httpx

from latteflow.serve.api.errors import ApiError

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def fetch_picture(url: str, domains: Collection[str], most_bytes: int) -> bytes:
    """Return the body of a picture's URL.

    Args:
        url: http or https.
        domains: allowed hosts, in lower case; ``host:port`` for other ports than 80 and 443.
        most_bytes: of the body.

    Raises:
        ApiError: it is elsewhere, cannot be had, is no picture, or is too large.
    """
    parsed = _allowed(url, domains)
    port = parsed.port or _PORTS[parsed.scheme]
    address = await _public_address(parsed.host, port)
    # The address takes the name's place; the name is kept where servers and certificates want it.
    request = httpx.Request(
        "GET",
        parsed.copy_with(host=address),
        headers={"Host": parsed.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"},
        extensions={"sni_hostname": parsed.raw_host.decode("ascii"), "timeout": httpx.Timeout(5.0).as_dict()},
    )
    try:
        async with httpx.AsyncClient(follow_redirects=False, trust_env=False) as client:
            answer = await client.send(request, stream=True)
            try:
                return await _body(answer, most_bytes)
            finally:
                await answer.aclose()
    except (httpx.HTTPError, ssl.SSLError, OSError) as error:
        raise _refusal("the picture's server did not answer as it should") from error


def _allowed(url: str, domains: Collection[str]) -> httpx.URL:
    """Return the URL in the form that is fetched, so that nothing else parses it in another way."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise _refusal("the picture's URL cannot be read") from error
    host = parsed.raw_host.decode("ascii", "replace").lower()
    named = host if parsed.port is None else f"{host}:{parsed.port}"
    if parsed.scheme not in _PORTS or parsed.userinfo or named not in domains:
        raise _refusal("pictures are not fetched from there: send the picture itself, as a data: URL")
    return parsed


async def _public_address(host: str, port: int) -> str:
    """Return one address of a host, all of whose addresses are public."""
    try:
        found = await anyio.getaddrinfo(host, port)
    except OSError as error:
        raise _refusal("the picture's server is not found") from error
    addresses: list[Any] = [ipaddress.ip_address(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise _refusal("pictures are not fetched from there: send the picture itself, as a data: URL")
    return str(addresses[0])


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address, and the one it may hold inside, is one of the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner and not is_public(inner):
            return False
    return address.is_global and not address.is_multicast


async def _body(answer: httpx.Response, most_bytes: int) -> bytes:
    kind = answer.headers.get("content-type", "")
    if answer.status_code != 200 or not kind.startswith("image/") or "content-encoding" in answer.headers:
        raise _refusal("the picture's server did not answer with a picture")
    data = bytearray()
    async for piece in answer.aiter_raw():
        data += piece
        if len(data) > most_bytes:
            raise _refusal("the picture is too large")
    return bytes(data)


def _refusal(words: str) -> ApiError:
    return ApiError(400, "image_url_refused", words, param="messages")
