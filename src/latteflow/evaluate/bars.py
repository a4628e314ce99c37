"""Figures as bars in HTML: rows of a table, which are read aloud, wrap on a phone, and need no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from latteflow.evaluate.record import Figure

STYLE = """
.bars { width: 100%; table-layout: fixed; } .bars caption { text-align: left; font-weight: 600; }
.bars th { width: 36%; } .bars td.number { width: 28%; } small { display: block; }
.bar div { position: relative; height: 1rem; margin-top: .25rem; } .bar b, .bar i { position: absolute; height: 100%; }
.bar b { background: var(--bar); } .bar i { top: 50%; height: 2px; background: currentColor; }
"""


def bars(figures: Sequence[Figure]) -> str:
    """Return figures of one name as a table: a row a set, with its bar, and a line from the lowest to the highest.

    Shares are drawn on a scale from 0 to 1, others from 0 to the largest of them. A figure without a value says why. No
    bars are drawn where one would be negative, or all are nothing.

    Args:
        figures: alike in measure and name, at least one.
    """
    ends = [end for one in figures for end in (one.value, one.lowest, one.highest) if end is not None]
    scale = 1.0 if figures[0].unit == "share" else max(ends, default=0.0)
    drawn = scale > 0 and min(ends, default=0.0) >= 0
    rows = [
        f'<tr><th scope="row">{escape(one.of)}</th><td class="bar">{_bar(one, scale) if drawn else ""}</td>'
        f'<td class="number">{_number(one)}</td></tr>'
        if one.value is not None
        else f'<tr><th scope="row">{escape(one.of)}</th><td colspan="2">{escape(one.told)}</td></tr>'
        for one in figures
    ]
    return "\n".join([f'<table class="bars"><caption>{escape(figures[0].name)}</caption>', *rows, "</table>"])


def _bar(figure: Figure, scale: float) -> str:
    line = ""
    if figure.lowest is not None and figure.highest is not None:
        start, end = (100 * value / scale for value in (figure.lowest, figure.highest))
        line = f'<i style="left:{start:.1f}%;width:{end - start:.1f}%"></i>'
    return f'<div><b style="width:{100 * (figure.value or 0.0) / scale:.1f}%"></b>{line}</div>'


def _number(figure: Figure) -> str:
    spread = f"<small>{escape(figure.spread)}</small>" if figure.spread else ""
    return escape(figure.number) + spread
