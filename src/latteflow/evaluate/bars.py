"""Figures as bars in SVG: text that stands in a page, so that a report needs no other file and no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from latteflow.evaluate.record import Figure

_WIDTH, _LEFT, _RIGHT = 640, 190, 130
_BAR, _GAP, _TITLE = 16, 6, 30


def bars(figures: Sequence[Figure]) -> str:
    """Return figures of one name as horizontal bars, one a set, with a line from the lowest seed to the highest.

    Shares are drawn on a scale from 0 to 1, others from 0 to the largest of them. Figures without a value are left out;
    where none has one, or one is negative, nothing is drawn.

    Args:
        figures: alike in measure and name.
    """
    drawn = [(figure, figure.value) for figure in figures if figure.value is not None]
    largest = max((max(value, figure.highest or value) for figure, value in drawn), default=0.0)
    if largest <= 0 or min(value for _, value in drawn) < 0:
        return ""
    scale = (_WIDTH - _LEFT - _RIGHT) / (1.0 if drawn[0][0].unit == "share" else largest)
    height = _TITLE + len(drawn) * (_BAR + _GAP)
    name = escape(drawn[0][0].name)
    lines = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{name}">',
        f'<text class="title" x="0" y="18">{name}</text>',
    ]
    for number, (figure, value) in enumerate(drawn):
        top = _TITLE + number * (_BAR + _GAP)
        middle, length = top + _BAR / 2, scale * value
        lines.append(f'<text class="of" x="{_LEFT - 8}" y="{middle + 4:.1f}">{escape(figure.of)}</text>')
        lines.append(f'<rect x="{_LEFT}" y="{top}" width="{length:.1f}" height="{_BAR}" rx="2"/>')
        if figure.lowest is not None and figure.highest is not None and figure.lowest < figure.highest:
            ends = [_LEFT + scale * end for end in (max(figure.lowest, 0.0), figure.highest)]
            lines.append(f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{middle}" y2="{middle}"/>')
        end = _LEFT + scale * max(value, figure.highest or value) + 8
        lines.append(f'<text x="{end:.1f}" y="{middle + 4:.1f}">{escape(figure.shown.partition(" (")[0])}</text>')
    return "\n".join([*lines, "</svg>"])
