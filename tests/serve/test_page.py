"""The page in a browser: Chromium against a live server, whose engine is a fake that can be told to wait and to fail.

No test passes if the browser asked anyone but the server, or complained.
"""

import base64
import gc
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from live import live, wait_for
from PIL import Image

import toys
from latteflow.serve.api.keys import ApiKeys
from latteflow.serve.api.settings import ServerSettings
from latteflow.serve.engine.requests import ChatRequest, EngineFailed, QueueFull
from latteflow.serve.engine.settings import EngineSettings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "a-key-that-is-long-enough"
NASTY = '<img src=x onerror="document.title=1">'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
    # Gradio leaves event loops open and has pandas warn; its warnings are not ours to put right.
    pytest.mark.filterwarnings("ignore"),
]


@contextmanager
def server_with_page(settings=None):
    from latteflow.serve.page.page import mount_page

    settings = settings or ServerSettings(model="toy")
    engine = FakeEngine(toys.toy_pipeline(), EngineSettings(max_queued_pictures=16, max_active=4))
    with live(engine, settings, prepare=lambda app: mount_page(app, settings.keys.accepts)) as server:
        gc.collect()
        yield server


@pytest.fixture(scope="module")
def module_server():
    with server_with_page() as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(server, browser):
    """A function that opens the page in a new window."""
    windows, asked, complaints = [], [], []

    def opened(**options):
        window = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        windows.append(window)
        page = window.new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        page.get_by_label("Prompt", exact=True).wait_for()
        return page

    yield opened
    for window in windows:
        window.close()
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []
    assert complaints == []


@pytest.fixture
def page(opened):
    return opened()


def fill(page, prompt, **fields):
    page.get_by_label("Prompt", exact=True).fill(prompt)
    if fields and not page.get_by_label("Negative prompt").is_visible():
        page.get_by_role("button", name="Advanced settings").click()
        page.get_by_label("Negative prompt").wait_for()
        page.wait_for_timeout(300)  # what is typed while Gradio still makes the fields is lost
    for label, value in fields.items():
        page.get_by_label(label, exact=True).fill(str(value))


def drawn(page):
    """The finished picture's file, once it is there."""
    link = page.locator("#picture a")
    link.wait_for()
    return base64.b64decode(link.get_attribute("href").partition("base64,")[2])


def draw(page, prompt, **fields):
    fill(page, prompt, **fields)
    before = page.locator("#gallery button").count()
    page.get_by_role("button", name="Generate").click()
    wait_for(lambda: page.locator("#gallery button").count() == before + 1)
    status_says(page, "Done in")
    return drawn(page)


def give_settings_of(page, file):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Settings from a picture").click()
    chooser.value.set_files(file)


def seeded(page, seed):
    fill(page, "", **{"Seed": seed})
    page.get_by_label("A new seed every time").uncheck()


def status_says(page, words):
    page.locator("#status", has_text=words).wait_for()


def test_previews_come_and_then_the_picture_with_its_settings_inside(page, server):
    server.engine.step_seconds = 0.03
    seeded(page, 11)
    fill(
        page,
        "a red heart",
        **{"Negative prompt": "blue", "number input for Steps": 20, "number input for Guidance": 2.5},
    )
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    seen = set()

    def look():
        if page.locator("#picture img").count():
            seen.add(page.locator("#picture img").get_attribute("src"))
        return page.locator("#picture a").count()

    wait_for(look)
    assert len(seen) >= 3
    text = Image.open(io.BytesIO(drawn(page))).text
    record = json.loads(text["latteflow"])
    said = {"prompt": "a red heart", "negative_prompt": "blue", "seed": 11, "steps": 20, "guidance": 2.5}
    assert {name: record[name] for name in said} == said
    assert page.locator("#picture img").get_attribute("alt") == "a red heart"
    assert page.locator("#strip .strip-steps span").count() == 20
    assert page.locator("#strip", has_text=re.compile("expert 1, t 0 to .*: 10 steps")).count() == 1


def test_a_seed_is_a_picture(page):
    seeded(page, 3)
    first = draw(page, "a red heart")
    assert draw(page, "a red heart") == first
    page.get_by_label("A new seed every time").check()
    assert draw(page, "a red heart") != first
    assert page.get_by_label("Seed", exact=True).input_value() != "3"


def begin(page, server, prompt="a red heart"):
    """Begin a drawing that takes half a minute."""
    server.engine.step_seconds = 0.5
    fill(page, prompt)
    page.get_by_role("button", name="Generate").click()
    wait_for(lambda: server.engine.active)


def test_stop_stops(page, server):
    begin(page, server)
    page.get_by_role("button", name="Stop").click()
    wait_for(lambda: server.engine.idle, 5)
    status_says(page, "Stopped.")
    server.engine.step_seconds = 0
    draw(page, "a red heart")


def test_closing_the_window_stops(page, server):
    begin(page, server)
    page.close()
    wait_for(lambda: server.engine.idle, 5)


def test_two_windows_draw_at_the_same_time(opened, server):
    one, other = opened(), opened()
    begin(one, server)
    begin(other, server, "a blue square")
    wait_for(lambda: len(server.engine.active) == 2)
    server.engine.step_seconds = 0
    assert drawn(one) != drawn(other)


@pytest.mark.parametrize(
    ("attribute", "error", "words"),
    [
        ("refuses", QueueFull(4), "The queue is full: try again in 4 s."),
        ("fails", EngineFailed("x"), "The engine broke down: ask again."),
    ],
)
def test_trouble_is_told_and_gets_over(page, server, attribute, error, words):
    setattr(server.engine, attribute, error)
    fill(page, "a red heart")
    page.get_by_role("button", name="Generate").click()
    status_says(page, words)
    setattr(server.engine, attribute, None)
    draw(page, "a red heart")


def test_what_cannot_be_is_told(page, server):
    page.get_by_role("button", name="Generate").click()
    status_says(page, "The prompt is empty: say what to draw.")
    fill(page, "a red heart", **{"Size: WIDTHxHEIGHT in pixels, or auto": "large"})
    page.get_by_role("button", name="Generate").click()
    status_says(page, "is not WIDTHxHEIGHT in pixels")
    assert server.engine.seen == []


def test_the_gallery_brings_settings_back(page):
    seeded(page, 21)
    first = draw(page, "the first", **{"number input for Steps": 5})
    draw(page, "the second", Seed=22)
    assert page.locator("#gallery button").count() == 2
    page.locator("#gallery button").last.click()
    status_says(page, "Its settings are in the form.")
    assert drawn(page) == first
    assert page.get_by_label("Prompt", exact=True).input_value() == "the first"
    assert page.get_by_label("Seed", exact=True).input_value() == "21"
    assert page.get_by_label("number input for Steps").input_value() == "5"


def test_a_picture_brings_settings_back(page, tmp_path):
    seeded(page, 31)
    (tmp_path / "a.png").write_bytes(draw(page, "of long ago"))
    fill(page, "something else", Seed=1)
    give_settings_of(page, tmp_path / "a.png")
    status_says(page, "The picture's settings are in the form.")
    assert page.get_by_label("Prompt", exact=True).input_value() == "of long ago"
    assert page.get_by_label("Seed", exact=True).input_value() == "31"
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    give_settings_of(page, tmp_path / "b.png")
    status_says(page, "This picture carries no settings: give a PNG that latteflow drew.")


def test_the_same_again_elsewhere_is_the_same(page, server, tmp_path):
    seeded(page, 41)
    fill(page, 'a heart that\'s "red" & <b>', **{"number input for Steps": 3})
    picture = draw(page, 'a heart that\'s "red" & <b>')
    page.get_by_role("button", name="Settings, and the same again elsewhere").click()
    program = page.locator("#as-python .cm-content").inner_text()
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "picture.png").read_bytes() == picture
    said = " ".join(shlex.split(page.locator("#as-command .cm-content").inner_text()))
    assert said.startswith('latteflow generate a heart that\'s "red" & <b> --model toy --seed 41 --steps 3')
    if shutil.which("curl"):
        (tmp_path / "picture.png").unlink()
        lines = page.locator("#as-curl .cm-content").inner_text().replace("python -c", f"{sys.executable} -c")
        subprocess.run(["bash", "-c", lines], cwd=tmp_path, check=True, timeout=60, capture_output=True)
        assert (tmp_path / "picture.png").read_bytes() == picture


def test_a_drawing_is_asked_about(page, server):
    server.engine.step_seconds = 0.1
    draw(page, "a red heart", **{"number input for Steps": 2})
    page.get_by_role("button", name="Ask about this picture").click()
    message = page.locator("#message textarea")
    message.wait_for()
    wait_for(lambda: message.input_value() == "What is this?")
    message.press("Enter")
    page.locator("#conversation", has_text="a red heart, noto style").wait_for()
    [asked] = [request for request in server.engine.seen if isinstance(request, ChatRequest)]
    kinds = [part["type"] for part in asked.messages[-1]["content"]]
    assert kinds == ["image", "text"]
    assert page.locator("#conversation img").first.evaluate("picture => picture.naturalWidth") == toys.SIZE
    page.get_by_role("button", name="Draw the last answer").click()
    wait_for(lambda: page.get_by_label("Prompt", exact=True).input_value() == "a red heart, noto style")


def test_a_conversation_goes_on_and_begins_anew(page, server, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg")
    page.get_by_role("tab", name="Chat").click()
    page.locator("#message input[type=file]").set_input_files(tmp_path / "a.jpg")
    page.locator("#message img").wait_for()
    page.locator("#message textarea").fill(f"What is this? {NASTY}")
    page.locator("#message textarea").press("Enter")
    page.locator("#conversation", has_text="noto style").wait_for()
    assert page.locator("#conversation", has_text=NASTY).count() == 1
    wait_for(lambda: page.locator("#message textarea").is_enabled())
    page.locator("#message textarea").fill("And this?")
    page.locator("#message textarea").press("Enter")
    wait_for(lambda: len(server.engine.seen) == 2)
    assert [message["role"] for message in server.engine.seen[-1].messages] == ["user", "assistant", "user"]
    page.get_by_role("button", name="New conversation").click()
    wait_for(lambda: page.locator("#conversation", has_text="noto style").count() == 0)


def test_an_answer_is_stopped(page, server):
    server.engine.step_seconds = 0.5
    page.get_by_role("tab", name="Chat").click()
    page.locator("#message textarea").fill("What is this?")
    page.locator("#message textarea").press("Enter")
    wait_for(lambda: server.engine.active)
    page.locator("#message button.stop-button").click()
    wait_for(lambda: server.engine.idle, 5)
    page.locator("#chat-status", has_text="Stopped.").wait_for()


def test_what_is_no_picture_is_told(page, tmp_path):
    (tmp_path / "a.png").write_bytes(b"<svg onload=alert(1)>")
    page.get_by_role("tab", name="Chat").click()
    page.locator("#message input[type=file]").set_input_files(tmp_path / "a.png")
    page.locator("#message textarea").fill("What is this?")
    page.locator("#message textarea").press("Enter")
    page.locator("#chat-status", has_text="This is no PNG, JPEG or WebP picture: give one.").wait_for()


def test_words_never_become_html(page):
    draw(page, NASTY, **{"Negative prompt": NASTY})
    page.get_by_role("button", name="Settings, and the same again elsewhere").click()
    page.locator("#details", has_text=NASTY).wait_for()
    assert page.locator("img[src=x]").count() == 0
    assert page.title() == "latteflow"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_it_whole(opened, scheme):
    page = opened(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    draw(page, "a red heart with a very long name " * 5)
    for tab in ("Draw", "Chat"):
        page.get_by_role("tab", name=tab).click()
        # A frame may cut off what is too wide, so its own edge says nothing.
        beyond = page.evaluate(
            """() => [...document.querySelectorAll('html, img, textarea, input, #generate, #stop, #strip *, #status *')]
                .filter(each => each.getBoundingClientRect().right > innerWidth || each.scrollLeft > 0)
                .map(each => each.outerHTML.slice(0, 80))"""
        )
        assert beyond == []
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_every_field_and_button_says_what_it_is(page):
    page.get_by_role("button", name="Advanced settings").click()
    for tab in ("Draw", "Chat"):
        page.get_by_role("tab", name=tab).click()
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, button')]
                .filter(each => each.offsetParent && !(each.innerText.trim() || each.getAttribute('aria-label') ||
                    each.labels?.length || each.title || each.placeholder))
                .map(each => each.outerHTML)"""
        )
        assert nameless == []


def test_only_what_the_page_needs_is_there(server, http):
    for path in ("info", "proxy=http://127.0.0.1", "runs", "user", "openapi.json", "dev/reload", "app_id", "call/x"):
        answer = http.get(f"/gradio_api/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
    for path in ("/etc/passwd", "..%2f..%2f..%2fetc/passwd", str(Path(__file__)), "http://127.0.0.1:1/", "C:/windows"):
        answer = http.get(f"/gradio_api/file={path}")
        assert answer.status_code in (403, 404), path
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert http.get("/v1/images/generations").status_code == 405


def test_the_page_wants_the_key_as_well(browser):
    with server_with_page(ServerSettings(model="toy", keys=ApiKeys([KEY]))) as server, server.http() as http:
        for path in (
            "/",
            "/config",
            "/assets/x.js",
            "/gradio_api/queue/data?session_hash=x",
            "/gradio_api/file=/etc/passwd",
        ):
            answer = http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
            assert answer.headers["www-authenticate"].startswith("Basic ")
        assert http.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
        with browser.new_context(http_credentials={"username": "me", "password": KEY}) as window:
            page = window.new_page()
            page.goto(server.url)
            draw(page, "a red heart")
            page.get_by_role("button", name="Settings, and the same again elsewhere").click()
            shown = page.locator("#as-curl .cm-content").inner_text()
        assert "$LATTEFLOW_API_KEY" in shown
        assert KEY not in shown
