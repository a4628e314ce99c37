"""Pages of the site that no file of docs/ holds: documents from elsewhere in the repository, and the API reference.

A hook of MkDocs (`mkdocs.yml`). The API reference has a page a module, written from its docstrings by mkdocstrings, and
one a package; a new module gets its page by itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/*": "benchmarks/",
    "examples/*.md": "examples/",
    "recipes/emoji-64/README.md": "recipes/emoji-64.md",
    "src/latteflow/weights/emoji-64/LICENSES.md": "models/emoji-64-licences.md",
    "src/latteflow/weights/emoji-64/README.md": "models/emoji-64.md",
}
"""Files of the repository, and where they are on the site; a folder keeps the files' names."""
SHOWN = {".md", ".png"}
LAYERS = ("", "flow", "nn", "models", "data", "train", "evaluate", "benchmark", "serve")
"""Order of the reference, after the package itself. The command has its own help, `latteflow VERB --help`."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the parts of the navigation that name a folder."""
    root = Path(config.config_file_path).parent
    folders = {
        "benchmarks": ["benchmarks/README.md", *sorted(_results(root))],
        "reference": _sections(root),
    }
    config.nav = _filled(config.nav, folders)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    root = Path(config.config_file_path).parent
    for file, uri in _elsewhere(root):
        files.append(File.generated(config, uri, abs_src_path=str(file)))
    for _, uri, content in _reference(root):
        files.append(File.generated(config, uri, content=content))
    return files


def _filled(nav: Any, folders: dict[str, list[Any]]) -> Any:
    if isinstance(nav, list):
        return [_filled(item, folders) for item in nav]
    if isinstance(nav, dict):
        return {title: _filled(item, folders) for title, item in nav.items()}
    return folders.get(nav, nav)


def _elsewhere(root: Path) -> Iterator[tuple[Path, str]]:
    for pattern, uri in ELSEWHERE.items():
        found = [file for file in sorted(root.glob(pattern)) if file.suffix in SHOWN]
        if not found:
            raise FileNotFoundError(f"the site shows {pattern}, and there is no such file in the repository")
        yield from ((file, uri + file.name if uri.endswith("/") else uri) for file in found)


def _results(root: Path) -> list[str]:
    pages = [uri for _, uri in _elsewhere(root) if uri.startswith("benchmarks/") and uri.endswith(".md")]
    return [uri for uri in pages if uri != "benchmarks/README.md"]


def _sections(root: Path) -> list[Any]:
    """The reference's part of the navigation: a section a package, which opens with what the package says of itself."""
    sections: dict[str, list[Any]] = {}
    for title, uri, _ in _reference(root):
        if uri.endswith("/index.md"):
            package = sections.setdefault(title, [uri])
        else:
            package.append({title: uri})
    return [{title: pages} for title, pages in sections.items()]


def _reference(root: Path) -> Iterator[tuple[str, str, str]]:
    """Title, address and text of a page for every package that has modules, each followed by a page a module."""
    source = root / "src"
    folders = [file.parent for file in source.glob("latteflow/**/__init__.py")]
    folders = [folder for folder in folders if _layer(folder, source) in LAYERS]
    for folder in sorted(folders, key=lambda folder: (LAYERS.index(_layer(folder, source)), folder)):
        package = ".".join(folder.relative_to(source).parts)
        modules = [file for file in sorted(folder.glob("*.py")) if not file.stem.startswith("_")]
        place = "/".join(["reference", *folder.relative_to(source).parts[1:]])
        if modules:
            yield package, f"{place}/index.md", _overview(package, modules)
            yield from ((file.stem, f"{place}/{file.stem}.md", _page(f"{package}.{file.stem}")) for file in modules)


def _layer(folder: Path, source: Path) -> str:
    return ([*folder.relative_to(source).parts, ""])[1]


def _page(module: str) -> str:
    return f"::: {module}\n    options: {{heading_level: 1}}\n"


def _overview(package: str, modules: list[Path]) -> str:
    """What a package says of itself, and what its modules say in their first line."""
    introduction = f"::: {package}\n    options: {{members: false, show_root_heading: false}}\n"
    rows = [f"| [`{file.stem}`]({file.stem}.md) | {_first_line(file)} |" for file in modules]
    return "\n".join([f"# {package}", "", introduction, "| module | what it is |", "| --- | --- |", *rows, ""])


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")
