"""What the page is made of, without a browser: settings in all their forms, the strip, HTML, and keys."""

import asyncio
import base64
import io
import json
import re
import shlex
from contextlib import aclosing

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from latteflow.cli.main import app as command
from latteflow.errors import UserError
from latteflow.serve.page import shown
from latteflow.serve.page.chat_tab import Turn
from latteflow.serve.page.client import ServerTrouble, _trouble
from latteflow.serve.page.drawings import Settings, command_line, curl, python, settings_of_picture
from latteflow.serve.page.stopping import StopButton, Stopped, until
from latteflow.serve.page.strip import Step, strip
from latteflow.serve.page.visitor import bearer

NASTY = """it's a "red" $(heart) `x` <b>&\\ 😀 --seed 3\n"""
SETTINGS = Settings(NASTY, negative_prompt="'; rm", seed=2**53 - 1, steps=7, guidance=2.5, size="64x32")


def png(path, **chunks):
    info = PngInfo()
    for name, text in chunks.items():
        info.add_itxt(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_servers_picture_gives_its_settings_back(tmp_path):
    record = {
        "prompt": NASTY,
        "negative_prompt": "'; rm",
        "seed": 2**53 - 1,
        "steps": 7,
        "guidance": 2.5,
        "size": "64x32",
    }
    file = png(tmp_path / "a.png", latteflow=json.dumps(record), software="latteflow 0.1.0")
    assert settings_of_picture(file, Settings("")) == SETTINGS


def test_a_picture_of_the_command_line_does_too(tmp_path):
    file = png(
        tmp_path / "a.png",
        prompt="a cat",
        seed="5",
        steps="7",
        guidance="2.5",
        negative_prompt="",
        software="latteflow 0.1.0",
    )
    assert settings_of_picture(file, Settings("", size="auto")) == Settings("a cat", "", 5, 7, 2.5, "auto")


@pytest.mark.parametrize(
    "chunks",
    [
        {},
        {"software": "latteflow 0.1.0"},
        {"prompt": "of another program", "seed": "3"},
        {"latteflow": "no JSON"},
        {"latteflow": "[" * 50_000},
        {"latteflow": "[1, 2]"},
        {"latteflow": '{"prompt": 3}'},
        {"latteflow": '{"prompt": "' + "x" * 100_001 + '"}'},
    ],
    ids=lambda chunks: repr(chunks)[:40],
)
def test_other_pictures_are_refused(tmp_path, chunks):
    with pytest.raises(UserError, match="give a PNG that latteflow drew"):
        settings_of_picture(png(tmp_path / "a.png", **chunks), Settings(""))


@pytest.mark.parametrize("data", [b"", b"<html>", b"\x89PNG\r\n\x1a\n broken", b"GIF89a"])
def test_no_pictures_are_refused(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UserError, match="give a PNG that latteflow drew"):
        settings_of_picture(tmp_path / "a.png", Settings(""))


def test_what_makes_no_sense_in_a_record_is_left_out(tmp_path):
    record = {"prompt": "a cat", "seed": -1, "steps": 10**9, "guidance": "much", "negative_prompt": [], "size": 3}
    file = png(tmp_path / "a.png", latteflow=json.dumps(record))
    assert settings_of_picture(file, Settings("")) == Settings("a cat")
    file = png(tmp_path / "b.png", latteflow='{"prompt": "a cat", "seed": true, "guidance": NaN, "steps": 1.5}')
    assert settings_of_picture(file, Settings("")) == Settings("a cat")


def test_the_command_line_is_understood_as_it_was_meant():
    words = shlex.split(command_line(SETTINGS, "emoji-64", {"dtype": "bfloat16"}))
    assert words[:3] == ["latteflow", "generate", NASTY]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given == {
        "--model": "emoji-64",
        "--seed": str(2**53 - 1),
        "--dtype": "bfloat16",
        "--steps": "7",
        "--guidance": "2.5",
        "--negative": "'; rm",
        "--width": "64",
        "--height": "32",
        "--out": "picture.png",
    }
    known = CliRunner().invoke(command, ["generate", "--help"], env={"COLUMNS": "200"}, color=False).output
    assert all(option in re.sub(r"\x1b\[[0-9;]*m", "", known) for option in given)


def test_a_prompt_that_looks_like_an_option_stays_a_prompt():
    words = shlex.split(command_line(Settings("--help"), "emoji-64", {}))
    assert words[words.index("--") + 1 :] == ["--help"]


def test_curl_sends_the_body_and_the_key_only_where_one_is_wanted():
    words = shlex.split(curl(SETTINGS, "emoji-64", "http://h:1", keyed=False))
    assert words[:2] == ["curl", "http://h:1/v1/images/generations"]
    assert json.loads(words[words.index("-d") + 1]) == SETTINGS.body("emoji-64")
    assert "Authorization" not in " ".join(words)
    assert "LATTEFLOW_API_KEY" in curl(SETTINGS, "emoji-64", "http://h:1", keyed=True)


@pytest.mark.parametrize("keyed", [False, True])
def test_the_program_is_python(keyed):
    program = python(SETTINGS, "emoji-64", "http://h:1", keyed=keyed)
    compile(program, "program", "exec")
    assert ("LATTEFLOW_API_KEY" in program) == keyed
    assert repr(NASTY) in program


def test_the_strip_says_which_expert_ran_and_how_long():
    made = [Step(i + 1, 4, i // 2, i / 4, 0.01, 1 + i) for i in range(3)]
    html = strip(made, (0.0, 0.5, 1.0))
    assert html.count("<span") == 4
    assert html.count("title=") == 3
    assert "step 3: expert 2, t = 0.500, 10.0 ms, shared with 2 others" in html
    assert "expert 1, t 0 to 0.5: 2 steps, 20.0 ms" in html
    assert "3 of 4 steps" in html
    assert strip([], (0.0, 1.0)) == ""


def test_nothing_that_was_said_becomes_html():
    said = '"><img src=x onerror=alert(1)>'
    settings = Settings(said, negative_prompt=said)
    drawing = shown.Drawing(settings, png_bytes())
    pieces = [
        shown.picture(drawing.image, settings, finished=True),
        shown.gallery([drawing], 0),
        shown.details(settings),
        shown.status(said),
        shown.trouble(said),
        Turn("assistant", said).on_screen()["content"],
        Turn("user", said, (f"/pictures/{said}.png",)).on_screen()["content"],
    ]
    for piece in pieces:
        assert "<img src=x" not in piece
        assert not re.search(r"<[^>]*onerror", re.sub(r'"[^"]*"', "", piece)), piece


def png_bytes():
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_gallery_holds_small_pictures_newest_first():
    drawings = [shown.Drawing(Settings(f"thing {i}"), png_bytes()) for i in range(3)]
    html = shown.gallery(drawings, 1)
    assert re.findall(r'data-index="(\d)" aria-pressed="(\w+)"', html) == [
        ("2", "false"),
        ("1", "true"),
        ("0", "false"),
    ]
    first = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))
    assert max(first.size) == 128


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (None, None),
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic " + base64.b64encode(b"anyone:a:b").decode(), "a:b"),
        ("Basic " + base64.b64encode(b"anyone").decode(), None),
        ("Basic " + base64.b64encode(b"\xff\xfe:x").decode(), None),
        ("Basic no base64!", None),
        ("Digest abc", None),
    ],
)
def test_the_key_is_a_token_or_a_password(header, key):
    assert bearer(header) == key


def test_what_is_no_picture_is_not_sent(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<svg>")
    with pytest.raises(UserError, match="no PNG, JPEG or WebP"):
        Turn("user", "what?", (str(tmp_path / "a.png"),)).message()
    with pytest.raises(UserError, match="gone from the server"):
        Turn("user", "what?", (str(tmp_path / "b.png"),)).message()


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"error": 3}', b"<html>"])
def test_what_is_no_error_object_is_told_all_the_same(body):
    assert isinstance(_trouble(body), ServerTrouble)
    assert "try again" in str(_trouble(body))


@pytest.mark.parametrize("way", ["end", "press", "leave", "cancel"])
def test_where_items_come_from_is_closed_whatever_the_end_is(way):
    async def items():
        try:
            yield 1
            if way != "end":
                await asyncio.sleep(60)
        finally:
            closed.append(way)

    async def run():
        button = StopButton()
        with button.watched("mine") as pressed:
            async with aclosing(until(pressed, items())) as seen:
                async for item in seen:
                    assert item == 1
                    button.press("another")
                    if way == "press":
                        button.press("mine")
                    if way == "leave":
                        break
        assert closed == [way]  # now, and not when the loop ends
        button.press("mine")  # nothing runs any more

    async def cancelled():
        task = asyncio.ensure_future(run())
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    closed = []
    if way == "press":
        with pytest.raises(Stopped):
            asyncio.run(run())
    elif way == "cancel":
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled())
    else:
        asyncio.run(run())
    assert closed == [way]
