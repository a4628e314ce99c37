"""The documentation site: links of the documents lead somewhere, every package is in the reference, nothing is fetched
from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from markdown import Markdown
from mkdocs.config import load_config
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


SPEC = importlib.util.spec_from_file_location("docs_site_links", ROOT / "docs/site/links.py")
LINKS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(LINKS)


@pytest.fixture
def render(tmp_path):
    """HTML of a text in docs/a.md, among a few other files, with or without an address of the repository."""
    for file in ("docs/a.md", "docs/images/grid.png", "examples/own.md", "src/flow/path.py", "results/README.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()

    def render(text, repository=None):
        links = LINKS.RepositoryLinks(tmp_path, repository)
        links.pages = {
            "docs/a.md": "a.md",
            "docs/images/grid.png": "images/grid.png",
            "examples/own.md": "guides/own.md",
            "results/README.md": "figures/README.md",
        }
        links.file = "docs/a.md"
        return Markdown(extensions=[links, "fenced_code"]).convert(text)

    return render


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("[own](../examples/own.md)", '<a href="guides/own.md">own</a>'),
        ("[own](../examples/own.md#part)", '<a href="guides/own.md#part">own</a>'),
        ("[all](../results)", '<a href="figures/README.md">all</a>'),
        ("![g](images/grid.png)", '<img alt="g" src="images/grid.png" />'),
        ("[here](#part)", '<a href="#part">here</a>'),
        ("[out](https://example.org/a.md)", '<a href="https://example.org/a.md">out</a>'),
        ("`[own](../examples/own.md)`", "<code>[own](../examples/own.md)</code>"),
    ],
)
def test_links_to_pages_lead_to_where_the_site_has_them(render, text, html):
    assert render(text) == f"<p>{html}</p>"
    assert render(text, "https://example.org/us/it") == f"<p>{html}</p>"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[path.py](../src/flow/path.py)", '<span title="src/flow/path.py"><code>path.py</code></span>'),
        ("[`flow/path.py`](../src/flow/path.py)", '<span title="src/flow/path.py"><code>flow/path.py</code></span>'),
        (
            "[the path](../src/flow/path.py)",
            '<span title="src/flow/path.py">the path (<code>src/flow/path.py</code>)</span>',
        ),
        ("[a `t`](../src/flow)", '<span title="src/flow">a <code>t</code> (<code>src/flow</code>)</span>'),
    ],
)
def test_other_files_are_named_while_the_repository_has_no_address(render, text, named):
    assert render(text) == f"<p>{named}</p>"


def test_other_files_are_links_to_the_repository(render):
    at = "https://example.org/us/it"
    assert f'href="{at}/blob/main/src/flow/path.py"' in render("[path](../src/flow/path.py)", f"{at}/")
    assert f'href="{at}/tree/main/src/flow"' in render("[flow](../src/flow)", at)


@pytest.mark.parametrize("text", ["[no](../no.md)", "[no](../../own.md)", "![no](../src/flow/path.py)"])
def test_a_link_to_nothing_ends_the_build(render, text):
    with pytest.raises(PluginError, match=r"docs/a\.md"):
        render(text)


@pytest.fixture(scope="module")
def planned():
    """The navigation and the pages, as MkDocs has them before anything is built."""
    config = load_config(str(ROOT / "mkdocs.yml"))
    config.plugins.on_config(config)
    documents = [
        File(path.relative_to(ROOT / "docs").as_posix(), str(ROOT / "docs"), str(ROOT / "site"), True)
        for path in sorted((ROOT / "docs").glob("*.md"))
    ]
    return config.nav, config.plugins.on_files(Files(documents), config=config)


def leaves(nav):
    for item in nav:
        value = next(iter(item.values())) if isinstance(item, dict) else item
        yield from leaves(value) if isinstance(value, list) else [value]


def test_every_document_is_in_the_navigation_once(planned):
    nav, files = planned
    pages = {file.src_uri for file in files if file.src_uri.endswith(".md")} - {"README.md"}
    assert sorted(leaves(nav)) == sorted(pages)


def test_every_module_is_in_the_reference(planned):
    _, files = planned
    text = "\n".join(file.content_string for file in files if file.src_uri.startswith("reference/"))
    said = set(re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE))
    modules = {
        ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
        for file in (ROOT / "src").glob("latteflow/**/*.py")
        if not file.stem.startswith("_") and "cli" not in file.parts
    }
    assert len(modules) > 100
    assert modules <= said


def test_the_quick_starts_commands_are_the_readmes():
    """Which `test_readme.py` runs."""
    blocks = re.compile(r"```(?:bash|python)\n(.*?)```", re.DOTALL)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {line for block in blocks.findall(readme) for line in block.splitlines()}
    shown |= {line.split("  #")[0].rstrip() for line in shown}
    for page in ("index.md", "quickstart.md"):
        for block in blocks.findall((ROOT / "docs" / page).read_text(encoding="utf-8")):
            assert set(block.splitlines()) <= shown


FETCHING = {"script", "img", "source", "iframe", "video", "audio", "embed"}
RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}


class _Fetched(HTMLParser):
    """Addresses of all that a browser fetches by itself when it opens a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in FETCHING:
            self.addresses.append(given.get("src") or "")
        elif tag == "link" and RELATIONS & set((given.get("rel") or "").split()):
            self.addresses.append(given["href"])
        self.addresses += [part.split()[0] for part in (given.get("srcset") or "").split(",") if part.strip()]


def elsewhere(html):
    parser = _Fetched()
    parser.feed(html)
    return [address for address in parser.addresses if urlsplit(address).netloc]


def test_what_is_fetched_from_elsewhere_is_seen():
    assert elsewhere('<script src="https://cdn.example/a.js"></script>') == ["https://cdn.example/a.js"]
    assert elsewhere('<link rel="preconnect" href="//fonts.example">') == ["//fonts.example"]
    assert elsewhere('<img srcset="a.png 1x, http://i.example/b.png 2x">') == ["http://i.example/b.png"]
    assert elsewhere('<a href="https://example.org"></a><link rel="canonical" href="https://example.org">') == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_no_page_fetches_anything_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        assert elsewhere(page.read_text(encoding="utf-8")) == [], page
    for sheet in site.rglob("*.css"):
        assert (
            re.findall(r"url\(\s*['\"]?(?:https?:)?//[^)]+\)|@import\s+['\"]?(?:https?:)?//", sheet.read_text("utf-8"))
            == []
        )


@pytest.mark.slow
def test_a_browser_opens_the_pages_without_asking_anyone_else(site):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make install-dev")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(site), "0"]
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as server,
        playwright.sync_playwright() as tools,
    ):
        try:
            port = re.search(r"port (\d+)", server.stdout.readline())[1]
            home = f"http://127.0.0.1:{port}/"
            browser = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 390, "height": 844})
            asked, complaints = [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            for address in (
                "",
                "quickstart/",
                "paper/",
                "reference/flow/",
                "reference/flow/intervals/",
                "benchmarks/paper/",
                "LOG/",
            ):
                page.goto(home + address, wait_until="networkidle")
                too_wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                assert too_wide <= 0, f"{address}: {too_wide} pixels too wide for a telephone"
            browser.close()
        finally:
            server.terminate()
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((home, "data:", "blob:"))] == []
    assert complaints == []
