"""The report of an evaluation: one HTML file that asks nothing of the network, and the same figures in Markdown."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from latteflow.evaluate.bars import STYLE, bars
from latteflow.evaluate.figures import measures_in
from latteflow.evaluate.measures import Shown
from latteflow.evaluate.record import Evaluation, Figure

HTML, MARKDOWN = "report.html", "report.md"
_SIDE = 192
"""Pixels that shown pictures are brought down to."""
_ABOUT = {
    "embedded": "Held-out pictures: how well they are rebuilt, what the model answers about them and about its own "
    "drawings of their captions. Where there is a judge: what it takes drawings for, and the distances of features to "
    "those of real pictures (lower is closer).",
    "fidelity": "Drawings as a set beside real pictures. Distances (FD, FID): lower is closer; the others: higher is "
    "better.",
    "understanding": "Held-out questions, asked of the backbone alone and of the unified model: no answer may differ.",
    "text-to-image": "Public prompts, scored by their own scorers.",
    "compositional": "Pairs of concept and style that were never seen together, beside pairs that were, as the judge "
    "takes them.",
    "cost": "Counted and reckoned, not timed.",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --bar: #4a7ebb; --soft: #757575; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; } .soft { color: var(--soft); font-size: .85rem; }
.figures { display: grid; align-items: start; gap: 1.25rem 3rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
table { border-collapse: collapse; font-size: .9rem; margin: 1rem 0; } .figures table { margin: 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 400; overflow-wrap: break-word; }
td.number { font-variant-numeric: tabular-nums; } small { color: var(--soft); }
.pictures { display: grid; gap: 1rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
figure { margin: 0; } figcaption { font-size: .85rem; } .row { display: flex; gap: .25rem; }
.row div { flex: 1; min-width: 0; font-size: .7rem; color: var(--soft); line-height: 1.3; }
img { width: 100%; display: block; } details { margin: .5rem 0; } pre { overflow-x: auto; font-size: .8rem; }
"""
_ALLOWED = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(record: Evaluation, shown: Sequence[Shown], folder: Path) -> list[Path]:
    """Write ``report.html`` and ``report.md``, and return both.

    Args:
        record: the evaluation.
        shown: pictures for the HTML page.
        folder: is there.

    Raises:
        OSError: they cannot be written.
    """
    files = []
    for name, text in ((HTML, html_page(record, shown)), (MARKDOWN, markdown_page(record))):
        partial, file = folder / f".{name}.partial", folder / name
        partial.write_text(text, encoding="utf-8", errors="replace")
        os.replace(partial, file)
        files.append(file)
    return files


def html_page(record: Evaluation, shown: Sequence[Shown]) -> str:
    """Return the report as a page: figures as bars, pictures inside it, nothing fetched from anywhere."""
    title = escape(f"Evaluation of {record.model}")
    body = [f"<h1>{title}</h1>", f'<p class="soft">{escape(_headline(record))}</p>']
    pictures = {one.measure: [other for other in shown if other.measure == one.measure] for one in shown}
    for measure, figures in measures_in(record.figures).items():
        body += [f"<h2>{escape(measure)}</h2>", *(f"<p>{escape(about)}</p>" for about in _about(measure))]
        body += [_figures(figures), f'<p class="soft">{escape(_depends(record, measure, figures))}</p>']
        body.append(_pictures(pictures.pop(measure, [])))
    body += [f"<h2>{escape(name)}</h2>{_pictures(some)}" for name, some in pictures.items()]
    body += ["<h2>Conditions of all figures</h2>", _table(_conditions(record))]
    for name, values in (("Recipe", record.config), ("All results", record.results)):
        text = escape(json.dumps(values, indent=1, ensure_ascii=False))
        body.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_ALLOWED}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>\n<style>{_STYLE}{STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def markdown_page(record: Evaluation) -> str:
    """Return the figures and conditions as Markdown tables."""
    lines = [f"# Evaluation of {_cell(record.model)}", "", _cell(_headline(record)), ""]
    for measure, figures in measures_in(record.figures).items():
        lines += [f"## {_cell(measure)}", "", *(line for about in _about(measure) for line in (about, ""))]
        lines += ["| of | figure | value |", "| --- | --- | --- |"]
        lines += [f"| {_cell(one.of)} | {_cell(one.name)} | {_cell(one.told)} |" for one in figures]
        lines += ["", _cell(_depends(record, measure, figures)), ""]
    lines += ["## Conditions of all figures", "", "| condition | value |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in _conditions(record)]
    return "\n".join(lines) + "\n"


def _headline(record: Evaluation) -> str:
    here = record.environment
    seconds = sum(record.seconds.values())
    return (
        f"{record.date}, latteflow {here.get('latteflow')}, {here.get('gpu') or here.get('processor')}, {seconds:.0f} s"
    )


def _about(measure: str) -> list[str]:
    return [_ABOUT[measure]] if measure in _ABOUT else []


def _depends(record: Evaluation, measure: str, figures: Sequence[Figure]) -> str:
    """Return what the figures of a measure depend on, but for what all figures share, and how long they took."""
    shared = _shared(record.figures)
    values: dict[str, dict[str, None]] = {}
    for one in figures:
        for name, value in one.conditions.items():
            if name not in shared:
                values.setdefault(name, {})[_words(value)] = None
    parts = [f"{_name(name)} {' or '.join(some)}" for name, some in values.items()]
    return "; ".join([*parts, f"measured in {record.seconds.get(measure, 0):.0f} s"])


def _shared(figures: Sequence[Figure]) -> dict[str, Any]:
    """Return the conditions that every figure has, and has alike."""
    first = figures[0].conditions if figures else {}
    return {
        name: value
        for name, value in first.items()
        if all(name in one.conditions and one.conditions[name] == value for one in figures)
    }


def _conditions(record: Evaluation) -> list[tuple[str, str]]:
    found = {**_shared(record.figures), **record.environment}
    return [(_name(name), _words(value)) for name, value in found.items()]


def _name(condition: str) -> str:
    return condition.replace("_", " ")


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figures(figures: Sequence[Figure]) -> str:
    """Return bars of what has a figure of several sets, and the others in one table."""
    named: dict[str, list[Figure]] = {}
    for figure in figures:
        named.setdefault(figure.name, []).append(figure)
    several = [bars(some) for some in named.values() if len(some) > 1]
    singles = [one for one, *others in named.values() if not others]
    of_one = len({one.of for one in singles}) == 1
    alone = [(one.name if of_one else f"{one.name} ({one.of})", one.told) for one in singles]
    return "\n".join(['<div class="figures">', *several, *([_table(alone)] if alone else []), "</div>"])


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{escape(text)}</td></tr>' for name, text in rows
    ]
    return "\n".join(["<table>", *lines, "</table>"])


def _pictures(shown: Sequence[Shown]) -> str:
    if not shown:
        return ""
    figures = []
    for one in shown:
        row = "".join(
            f'<div><img alt="{escape(kind)}" src="{_inline(picture)}">{escape(kind)}</div>'
            for kind, picture in one.pictures.items()
        )
        figures.append(f'<figure><div class="row">{row}</div><figcaption>{escape(one.prompt)}</figcaption></figure>')
    return '<div class="pictures">\n' + "\n".join(figures) + "\n</div>"


def _inline(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _cell(text: str) -> str:
    """Return text that stays in its cell, as the words that it is."""
    flat = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in "\\|`*_<>[]#" else sign for sign in flat)
