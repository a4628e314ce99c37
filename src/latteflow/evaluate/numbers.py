"""Numbers as people read them."""

from __future__ import annotations

from typing import Literal

Unit = Literal["share", "dB", "parameters", "FLOP", "B", ""]


def shown_number(value: float, unit: Unit) -> str:
    """Return a number with its unit: a share in percent, what is counted in thousands, millions and so on."""
    if unit == "share":
        return f"{100 * value:.1f}%"
    if unit == "dB":
        return f"{value:.2f} dB"
    if unit:
        return short(value, "" if unit == "parameters" else unit)
    return f"{value:.4g}"


def short(number: float, unit: str = "") -> str:
    """Return three digits and the letter of their thousands, such as ``1.84M`` or, with a unit, ``97.7 MFLOP``."""
    space = " " if unit else ""
    for letter in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:  # what would round to 1000 is one of the next letter
            return f"{number:.3g}{space}{letter}{unit}"
        number /= 1000
    return f"{number:.3g}{space}P{unit}"
