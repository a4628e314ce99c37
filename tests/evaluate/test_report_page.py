"""The report: one file, nothing fetched, nothing from data taken for markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

from evaluation_toys import NASTY, evaluation, figure
from PIL import Image

from latteflow.evaluate.bars import bars
from latteflow.evaluate.measures import Shown
from latteflow.evaluate.report_page import HTML, MARKDOWN, html_page, markdown_page, write_report

EMPTY = {"meta", "img", "br", "rect", "line"}


class Page(HTMLParser):
    """Elements with their attributes, text, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def shown(prompt="a red circle", size=(32, 32)):
    return Shown("embedded", prompt, {kind: Image.new("RGB", size, kind) for kind in ("red", "blue")})


def nasty():
    some = [figure(NASTY, NASTY, 0.5, NASTY), figure(NASTY, NASTY + "2", None, NASTY, why=NASTY, reference=NASTY)]
    names = {"model": NASTY, "config": {NASTY: NASTY}, "results": {NASTY: [NASTY]}}
    return evaluation(some, environment={"processor": NASTY, NASTY: NASTY}, seconds={NASTY: 1.0}, **names)


def test_every_figure_is_in_the_page():
    page = Page(html_page(evaluation(), []))
    assert page.open == []
    for words in ("50.0%40.0% to 60.0%", "25.0%", "12.5", "1.84M", "none: the reference holds no spatial features"):
        assert words in page.text
    for words in ("2026-01-02T03:04:05Z", "latteflow 0.1.0", "a CPU", "9 held-out pictures (abc)", '"steps": 40'):
        assert words in page.text


def test_words_from_data_stay_words():
    plain, page = Page(html_page(evaluation(), [shown()])), Page(html_page(nasty(), [shown(NASTY)]))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
    assert "script" not in {tag for tag, _ in page.elements}
    assert NASTY in page.text
    assert page.open == []


def test_nothing_is_fetched_from_anywhere():
    text = html_page(nasty(), [shown(NASTY)])
    page = Page(text)
    for _, attributes in page.elements:
        assert not {"href", "srcset", "action", "onload", "onerror"} & attributes.keys()
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
    assert "url(" not in text
    assert "@import" not in text
    policy = next(one["content"] for one in page.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'")


def test_a_phone_can_show_it():
    page = Page(html_page(evaluation(), [shown()]))
    assert any(one.get("name") == "viewport" and "device-width" in one["content"] for one in page.all("meta"))
    assert all("width" not in one for one in page.all("img") + page.all("svg"))


def test_pictures_are_in_the_file_made_small():
    page = Page(html_page(evaluation(), [shown(), shown("a wide one", (800, 400))]))
    pictures = [Image.open(io.BytesIO(base64.b64decode(one["src"].partition(",")[2]))) for one in page.all("img")]
    assert [picture.size for picture in pictures] == [(32, 32), (32, 32), (192, 96), (192, 96)]
    assert [picture.getpixel((0, 0)) for picture in pictures[:2]] == [(255, 0, 0), (0, 0, 255)]
    assert [one["alt"] for one in page.all("img")] == ["red", "blue"] * 2
    assert "a wide one" in page.text


def test_pictures_of_a_measure_without_figures_are_shown_too():
    page = Page(html_page(evaluation(), [Shown("GenEval", "a dog", {"guided": Image.new("RGB", (8, 8))})]))
    assert "GenEval" in page.text
    assert len(page.all("img")) == 1


def widths(text, tag):
    styles = [dict(part.split(":") for part in one["style"].split(";")) for one in Page(text).all(tag)]
    return [float(style["width"].removesuffix("%")) for style in styles]


def test_bars_are_as_long_as_their_figures():
    text = bars([figure(value=0.5, lowest=0.25, highest=1.0), figure(of="without guidance", value=0.25)])
    assert widths(text, "b") == [50, 25]
    assert widths(text, "i") == [75]
    assert "left:25.0%" in text
    assert Page(text).text.split("\n") == [
        "answers: concept",
        "guided50.0%25.0% to 100.0%",
        "without guidance25.0%",
        "",
    ]
    assert widths(bars([figure(value=7.0, unit=""), figure(value=3.5, unit="")]), "b") == [100, 50]
    assert widths(bars([figure(value=6.0, highest=8.0, lowest=4.0, unit="")]), "b") == [75]


def test_bars_that_cannot_be_drawn_are_not():
    for some in (
        [figure(value=-1.0, unit=""), figure(value=2.0, unit="")],
        [figure(value=1.0, lowest=-1.0, highest=3.0, unit="")],
        [figure(value=0.0, unit="")],
    ):
        page = Page(bars(some))
        assert page.all("b") == []
        assert some[0].number in page.text
    page = Page(bars([figure(value=None, why="too few pictures"), figure(value=0.5)]))
    assert "none: too few pictures" in page.text
    assert len(page.all("b")) == 1


def test_what_has_one_set_alone_stands_in_a_table():
    page = Page(html_page(evaluation([figure("a", value=0.1), figure("a", "without guidance"), figure("b")]), []))
    assert [one.get("class") for one in page.all("table")] == ["bars", None, None]


def test_what_figures_depend_on_stands_beside_them():
    some = [
        figure("a"),
        figure("a", "without guidance", guidance_scale=1.0),
        figure("FID", measure="fidelity", steps=20),
    ]
    page = Page(html_page(evaluation(some), []))
    assert "steps 40; guidance scale 4 or 1; measured in 2 s" in page.text
    assert "steps 20; guidance scale 4; measured in 2 s" in page.text
    assert page.text.count("float32") == 1  # what all share is said once


def test_markdown_has_the_figures_and_stays_a_table():
    text = markdown_page(evaluation())
    assert "| guided | answers: concept | 50.0% (40.0% to 60.0%) |" in text
    assert "| network | Toy, 8 pixels |" in text
    for line in markdown_page(nasty()).splitlines():
        assert not re.search(r"(?<!\\)<", line)
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4)


def test_both_files_are_written_and_nothing_else(tmp_path):
    files = write_report(nasty(), [shown("\ud800 lone")], tmp_path)
    assert {file.name for file in files} == {file.name for file in tmp_path.iterdir()} == {HTML, MARKDOWN}
