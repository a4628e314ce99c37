"""Pictures from outside: only what is asked for is decoded, within bounds, and errors keep Pillow's words back."""

import base64
import io
import struct
import time
import zlib

import anyio
import numpy as np
import pytest
from live import LEAKS
from PIL import Image

import toys
from latteflow.serve.api import pictures
from latteflow.serve.api.errors import ApiError
from latteflow.serve.api.pictures import PictureReader
from latteflow.serve.api.settings import PictureLimits

PICTURE = toys.toy_picture("circle", "red", "solid")


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def file_of(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def read(*urls, **limits):
    async def all_of_them():
        reader = PictureReader(PictureLimits(**limits), (), anyio.CapacityLimiter(2))
        return [await reader.read(url) for url in urls]

    return anyio.run(all_of_them)


def refused(*urls, **limits):
    with pytest.raises(ApiError) as caught:
        read(*urls, **limits)
    assert caught.value.status_code == 400
    assert not LEAKS.search(caught.value.message), caught.value.message
    return caught.value.code


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, data=b"", before=b""):
    """A PNG of one bit a pixel, whose header promises a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def apng():
    return file_of(PICTURE, "PNG", save_all=True, append_images=[toys.toy_picture("square", "blue", "solid")])


def bomb(side):
    return png_of(side, side, bytes(side * ((side + 7) // 8 + 1)))


GOOD = {
    "png": file_of(PICTURE, "PNG"),
    "grey": file_of(PICTURE.convert("L"), "PNG"),
    "one bit": file_of(PICTURE.convert("1"), "PNG"),
    "16 bit": file_of(Image.fromarray(np.full((32, 32), 40000, dtype=np.uint16)), "PNG"),
    "palette": file_of(PICTURE.convert("P"), "PNG"),
    "transparent palette": file_of(PICTURE.convert("P"), "PNG", transparency=0),
    "grey with alpha": file_of(PICTURE.convert("LA"), "PNG"),
    "jpeg": file_of(PICTURE, "JPEG"),
    "cmyk": file_of(PICTURE.convert("CMYK"), "JPEG"),
    "webp": file_of(PICTURE, "WEBP"),
    "icc": file_of(PICTURE, "PNG", icc_profile=b"no profile at all"),
    "broken exif": file_of(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    "page behind it": file_of(PICTURE, "PNG") + b"<html><script>alert(1)</script></html>",
    "archive behind it": file_of(PICTURE, "PNG") + b"PK\x03\x04" + bytes(100),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("declared", ["png", "jpeg", "webp", "jpg"])
def test_sound_pictures_of_every_mode_become_rgb(data, declared):
    [image] = read(data_url(data, declared))
    assert (image.mode, image.size) == ("RGB", (32, 32))


def test_what_is_transparent_is_seen_on_white():
    [image] = read(data_url(file_of(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG")))
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_a_turned_picture_is_turned_back():
    exif = Image.Exif()
    exif[0x0112] = 6
    [image] = read(data_url(file_of(Image.new("RGB", (20, 10)), "JPEG", exif=exif)))
    assert image.size == (10, 20)


BROKEN = {
    "nothing": b"",
    "page": b"<html><body>x</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "gif": file_of(PICTURE, "GIF"),
    "bmp": file_of(PICTURE, "BMP"),
    "tiff": file_of(PICTURE, "TIFF"),
    "pdf": b"%PDF-1.7\n",
    "gif with a png behind it": file_of(PICTURE, "GIF") + file_of(PICTURE, "PNG"),
    "signature alone": b"\x89PNG\r\n\x1a\n",
    "no data": png_of(32, 32),
    "half a png": file_of(PICTURE, "PNG")[:100],
    "half a jpeg": file_of(PICTURE, "JPEG")[:300],
    "half a webp": file_of(PICTURE, "WEBP")[:40],
    "bad checksum": file_of(PICTURE, "PNG")[:29] + b"\0\0\0\0" + file_of(PICTURE, "PNG")[33:],
    "no size": png_of(0, 0),
    "moving": apng(),
    "moving webp": file_of(PICTURE, "WEBP", save_all=True, append_images=[toys.toy_picture("square", "blue", "solid")]),
    "text bomb": png_of(8, 8, bytes(16), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_anything_else_is_refused_in_our_words(data):
    assert refused(data_url(data)) == "invalid_image"


@pytest.mark.parametrize("side", [6000, 9500, 12000, 20000, 65000])
def test_a_bomb_is_judged_by_its_header(side, monkeypatch):
    """Below, between and above Pillow's own bounds; the sizes were chosen before anything is decoded."""
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self.size))
    data = bomb(side) if side < 10000 else png_of(side, side, bytes(1000))
    assert len(data) < 100_000
    assert refused(data_url(data)) == "image_too_large"
    assert decoded == []


@pytest.mark.parametrize("size", [(4000, 20), (1, 101)])
def test_stripes_are_refused(size):
    assert refused(data_url(png_of(2**31 + size[0], size[1]))) == "image_too_large"
    assert refused(data_url(file_of(Image.new("L", size), "PNG"))) == "image_too_large"


def test_bounds_hold_for_a_request_as_a_whole():
    url = data_url(GOOD["png"])
    assert len(read(*[url] * 3, count=3)) == 3
    assert refused(*[url] * 4, count=3) == "too_many_images"
    assert len(read(*[url] * 3, total_pixels=3 * 32 * 32)) == 3
    assert refused(*[url] * 4, total_pixels=4 * 32 * 32 - 1) == "image_too_large"
    size = len(GOOD["png"])
    assert len(read(*[url] * 3, total_bytes=3 * size)) == 3
    assert refused(*[url] * 4, total_bytes=4 * size - 1) == "image_too_large"


def test_a_picture_that_takes_too_long_is_left(monkeypatch):
    monkeypatch.setattr(pictures, "_decoded", lambda *_: time.sleep(0.5))
    started = time.monotonic()
    assert refused(data_url(GOOD["png"]), seconds=0.05) == "image_too_slow"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,",
        "data:image/png;base64",
        "data:image/png,abc",
        "data:image/gif;base64,R0lG",
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:text/html;base64,PGI+",
        "data:image/png;charset=x;base64,AAAA",
        "data:image/png;base64 ,AAAA",
    ],
)
def test_other_data_urls_are_refused(url):
    assert refused(url) == "invalid_image_url"


@pytest.mark.parametrize("text", ["*", "AAA", "AA\nAA", "ÄÄÄÄ", "A A A A", "%41%41%41%41"])
def test_broken_base64_is_refused(text):
    assert refused(f"data:image/png;base64,{text}") == "invalid_base64"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1/",
        "https://example.org/a.png",
        "ftp://x/",
        "gopher://x/",
    ],
)
def test_nothing_is_fetched_by_default(url):
    assert refused(url) == "image_url_not_allowed"


@pytest.mark.parametrize("name", ["png", "moving", "page", "nothing"])
def test_over_http(http, name):
    data = {**GOOD, **BROKEN}[name]
    parts = [{"type": "image_url", "image_url": {"url": data_url(data)}}]
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
    assert answer.status_code == (200 if name in GOOD else 400)
    assert not LEAKS.search(answer.text)
