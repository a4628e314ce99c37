"""Pictures from allowed domains: nothing but a public address of an allowed name is ever connected to."""

import ipaddress
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import anyio
import pytest

import toys
from latteflow.serve.api import fetch
from latteflow.serve.api.errors import ApiError
from latteflow.serve.api.pictures import PictureReader
from latteflow.serve.api.settings import PictureLimits

PNG = toys.png_bytes(toys.toy_picture("circle", "red", "solid"))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.hits.append((self.path, self.headers["Host"]))
        status, headers, pieces = self.server.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)

    def log_message(self, *_):
        pass


def endless():
    while True:
        yield bytes(10_000)


def dripping():
    while True:
        time.sleep(0.02)
        yield b"x"


IMAGE = {"Content-Type": "image/png"}
ANSWERS = {
    "/good": (200, IMAGE, [PNG]),
    "/redirect": (302, {"Location": "/good"}, []),
    "/html": (200, {"Content-Type": "text/html"}, [PNG]),
    "/packed": (200, {**IMAGE, "Content-Encoding": "gzip"}, [PNG]),
    "/error": (500, IMAGE, [PNG]),
    "/large": (200, {**IMAGE, "Content-Length": "99999999"}, [bytes(50_000)] * 100),
    "/endless": (200, IMAGE, endless()),
    "/slow": (200, IMAGE, dripping()),
}


@pytest.fixture
def web():
    """A web server on loopback; what it is asked for is in ``hits``."""
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.hits, server.answers = [], ANSWERS
    server.handle_error = lambda *_: None  # clients leave
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


def read(url, *domains, **limits):
    async def one():
        return await PictureReader(PictureLimits(**limits), domains, anyio.CapacityLimiter(1)).read(url)

    return anyio.run(one)


def resolving(monkeypatch, *addresses):
    """Have every name resolve to addresses; a later look-up gets loopback."""
    asked = []

    async def getaddrinfo(host, port, **_):
        asked.append(host)
        found = addresses if len(asked) == 1 else ("127.0.0.1",)
        return [(2, 1, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "me@127.0.0.1",
        "me@pictures.example",
        "me:secret@pictures.example",
        "pictures.example@127.0.0.1",
        "127.0.0.1#pictures.example",
        "127.0.0.1\\@pictures.example",
        "pictures.example.",
        "PICTURES.example.evil",
        "ⓛocalhost",
        "evil-pictures.example",
        "xpictures.example",
        "pictures.example%00.evil",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https", "HTTP", "ftp", "file", "gopher", ""])
def test_other_hosts_are_never_connected_to(web, monkeypatch, host, scheme):
    """Nor looked up."""
    asked = resolving(monkeypatch, "93.184.216.34")
    url = f"{scheme}://{host}:{web.server_port}/good" if scheme else f"//{host}:{web.server_port}/good"
    with pytest.raises(ApiError) as caught:
        read(url, "pictures.example", f"pictures.example:{web.server_port}")
    assert caught.value.code == "image_url_refused"
    assert str(web.server_port) not in caught.value.message
    assert (asked, web.hits) == ([], [])


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:100.64.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "198.18.0.1",
        "240.0.0.1",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "64:ff9b::a00:1",
        "::",
    ],
)
def test_an_allowed_name_that_leads_inside_is_refused(web, monkeypatch, address):
    """Alone, and among public addresses."""
    assert not fetch.is_public(ipaddress.ip_address(address))
    for addresses in ([address], ["93.184.216.34", address]):
        resolving(monkeypatch, *addresses)
        with pytest.raises(ApiError, match="not fetched from there"):
            read(f"http://pictures.example:{web.server_port}/good", f"pictures.example:{web.server_port}")
    assert web.hits == []


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_public(address):
    assert fetch.is_public(ipaddress.ip_address(address))


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(monkeypatch):
    """A name that resolves to loopback the second time is not asked a second time."""
    asked, sent = resolving(monkeypatch, "93.184.216.34"), []

    class Transport(fetch.httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            sent.append(request)
            return fetch.httpx.Response(200, headers=IMAGE, stream=fetch.httpx.ByteStream(PNG))

    client = fetch.httpx.AsyncClient
    monkeypatch.setattr(fetch.httpx, "AsyncClient", lambda **options: client(transport=Transport(), **options))
    assert read("https://Pictures.example/good?a=1", "pictures.example").size == (32, 32)
    [request] = sent
    assert asked == ["pictures.example"]
    assert str(request.url) == "https://93.184.216.34/good?a=1"
    assert request.headers["host"] == "pictures.example"
    assert request.extensions["sni_hostname"] == "pictures.example"


@pytest.fixture
def near(web, monkeypatch):
    """A function that fetches a path of the web server, loopback counting as public."""
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    named = f"localhost:{web.server_port}"
    return lambda path, **limits: read(f"http://{named}{path}", named, **limits)


def test_a_picture_is_fetched(web, near, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # is not asked
    assert near("/good").size == (32, 32)
    assert web.hits == [("/good", f"localhost:{web.server_port}")]


@pytest.mark.parametrize("path", ["/redirect", "/html", "/packed", "/error", "/large", "/endless"])
def test_other_answers_are_refused(web, near, path):
    with pytest.raises(ApiError) as caught:
        near(path, total_bytes=100_000)
    assert caught.value.code == "image_url_refused"
    assert [hit[0] for hit in web.hits] == [path]


def test_a_server_that_drips_is_left(near):
    with pytest.raises(ApiError) as caught:
        near("/slow", seconds=0.3)
    assert caught.value.code == "image_too_slow"


def test_a_server_that_is_not_there_is_named_as_such(near, web):
    web.server_close()
    with pytest.raises(ApiError, match="did not answer"):
        near("/good")
