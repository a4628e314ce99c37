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

from latteflow.evaluate.bars import bars
from latteflow.evaluate.figures import measures_in
from latteflow.evaluate.measures import Shown
from latteflow.evaluate.record import Evaluation, Figure

HTML, MARKDOWN = "report.html", "report.md"
_SIDE = 192
"""Pixels that shown pictures are brought down to."""
_PLOTTED = ("embedded", "fidelity", "understanding", "text-to-image", "compositional")
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --bar: #4a7ebb; --soft: #777; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
td, th { overflow-wrap: normal; } td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
figure { margin: 0; } figcaption { font-size: .85rem; } .row { display: flex; gap: .25rem; }
.row div { flex: 1; min-width: 0; font-size: .75rem; color: var(--soft); } img { width: 100%; display: block; }
svg { width: 100%; max-width: 40rem; height: auto; display: block; margin: .5rem 0; }
svg text { font: 13px system-ui, sans-serif; fill: currentColor; } svg .title { font-weight: 600; }
svg .of { text-anchor: end; } svg rect { fill: var(--bar); } svg line { stroke: currentColor; stroke-width: 2; }
pre { overflow-x: auto; font-size: .8rem; }
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
    """Return the report as a page: pictures inside it, plots as SVG, nothing fetched from anywhere."""
    title = escape(f"Evaluation of {record.model}")
    body = [f"<h1>{title}</h1>", f'<p class="soft">{escape(_headline(record))}</p>']
    pictures = {one.measure: [other for other in shown if other.measure == one.measure] for one in shown}
    for measure, figures in measures_in(record.figures).items():
        body.append(f"<h2>{escape(measure)}</h2>")
        body += [_plots(figures)] if measure in _PLOTTED else []
        body.append(_table(("of", "figure", "value"), ((one.of, one.name, _value(one)) for one in figures)))
        if measure in pictures:
            body.append(_pictures(pictures.pop(measure)))
    body += [f"<h2>{escape(name)}</h2>{_pictures(some)}" for name, some in pictures.items()]
    body.append("<h2>Conditions</h2>")
    body.append(_table(("condition", "value"), _conditions(record)))
    for name, values in (("Recipe", record.config), ("All results", record.results)):
        text = escape(json.dumps(values, indent=1, ensure_ascii=False))
        body.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_ALLOWED}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def markdown_page(record: Evaluation) -> str:
    """Return the figures and conditions as Markdown tables."""
    lines = [f"# Evaluation of {_cell(record.model)}", "", _cell(_headline(record)), ""]
    for measure, figures in measures_in(record.figures).items():
        lines += [f"## {measure}", "", "| of | figure | value |", "| --- | --- | --- |"]
        lines += [f"| {_cell(one.of)} | {_cell(one.name)} | {_cell(_value(one))} |" for one in figures] + [""]
    lines += ["## Conditions", "", "| condition | value |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in _conditions(record)]
    return "\n".join(lines) + "\n"


def _headline(record: Evaluation) -> str:
    here = record.environment
    seconds = sum(record.seconds.values())
    return (
        f"{record.date}, latteflow {here.get('latteflow')}, {here.get('gpu') or here.get('processor')}, {seconds:.0f} s"
    )


def _conditions(record: Evaluation) -> list[tuple[str, str]]:
    """Return versions and hardware, and what the figures of each measure have in common."""
    rows = [(name, _words(value)) for name, value in record.environment.items()]
    for measure, figures in measures_in(record.figures).items():
        names = list(dict.fromkeys(name for one in figures for name in one.conditions))
        for name in names:
            values = dict.fromkeys(_words(one.conditions[name]) for one in figures if name in one.conditions)
            rows.append((f"{measure}: {name}", "; ".join(values)))
        rows.append((f"{measure}: seconds", f"{record.seconds.get(measure, 0):.0f}"))
    return rows


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(figure: Figure) -> str:
    return figure.shown if not figure.why else f"{figure.shown}: {figure.why}"


def _plots(figures: Sequence[Figure]) -> str:
    names = dict.fromkeys(figure.name for figure in figures)
    return "\n".join(bars([figure for figure in figures if figure.name == name]) for name in names)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = []
    for row in rows:
        *cells, last = (escape(cell) for cell in row)
        number = ' class="number"' if len(last) < 40 else ""
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}<td{number}>{last}</td></tr>")
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"


def _pictures(shown: Sequence[Shown]) -> str:
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
