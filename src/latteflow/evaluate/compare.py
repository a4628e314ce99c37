"""Two evaluations side by side: differences, and which figures may not be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latteflow.evaluate.numbers import shown_number
from latteflow.evaluate.record import Evaluation, Figure

COMPARED = ("model", "device", "seeds", "seed")
"""Conditions that two comparable figures may differ in: what is compared, and what changes rounding or noise alone."""


@dataclass(frozen=True)
class Row:
    """A figure of both evaluations."""

    measure: str
    of: str
    name: str
    one: Figure | None
    other: Figure | None
    differing: tuple[str, ...]
    """Conditions that differ, such as ``steps 40 / 20``: then the two are not comparable."""

    @property
    def comparable(self) -> bool:
        """Whether the difference means anything."""
        return self.difference is not None

    @property
    def difference(self) -> float | None:
        """The second less the first; None where they are not comparable or one has no value."""
        if self.one is None or self.other is None or self.differing:
            return None
        if self.one.value is None or self.other.value is None:
            return None
        return self.other.value - self.one.value

    @property
    def verdict(self) -> str:
        """The difference in words, or why there is none."""
        if self.one is None or self.other is None:
            return "in one alone"
        if self.differing:
            return f"not comparable: {', '.join(self.differing)}"
        if self.difference is None:
            return "no value"
        share = self.one.unit == "share"
        number = (
            f"{100 * abs(self.difference):.1f} points" if share else shown_number(abs(self.difference), self.one.unit)
        )
        return ("-" if self.difference < 0 else "+") + number + (", spreads overlap" if self._overlap else "")

    @property
    def _overlap(self) -> bool:
        """Whether both have a spread, and a value that lies in both."""
        ends = [(one.lowest, one.highest) for one in (self.one, self.other) if one is not None and one.spread]
        return len(ends) == 2 and ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]  # type: ignore[operator]


@dataclass(frozen=True)
class Comparison:
    """Two evaluations."""

    rows: tuple[Row, ...]
    """By measure, set and name, in the order of the first."""
    differing: dict[str, tuple[Any, Any]]
    """What differs of environment and recipe, dotted: the first's value and the second's."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        rows = [
            {
                "measure": row.measure,
                "of": row.of,
                "name": row.name,
                "values": [None if figure is None else figure.value for figure in (row.one, row.other)],
                "difference": row.difference,
                "verdict": row.verdict,
            }
            for row in self.rows
        ]
        return {"figures": rows, "differing": {name: list(values) for name, values in self.differing.items()}}


def compare(one: Evaluation, other: Evaluation) -> Comparison:
    """Return two evaluations side by side.

    Figures are compared where all conditions agree: dtype, quantization, steps, scheduler, guidance, samples,
    reference, network, judge and whatever else a figure says that it depends on, but not ``COMPARED``.
    """
    found = [{_key(figure): figure for figure in record.figures} for record in (one, other)]
    rows = [
        Row(*key, found[0].get(key), found[1].get(key), _differing(found[0].get(key), found[1].get(key)))
        for key in dict.fromkeys([*found[0], *found[1]])
    ]
    flat = [_flat({"model": record.model, **record.environment, **record.config}) for record in (one, other)]
    names = dict.fromkeys([*flat[0], *flat[1]])
    differing = {
        name: (flat[0].get(name), flat[1].get(name)) for name in names if flat[0].get(name) != flat[1].get(name)
    }
    return Comparison(tuple(rows), differing)


def _key(figure: Figure) -> tuple[str, str, str]:
    return figure.measure, figure.of, figure.name


def _differing(one: Figure | None, other: Figure | None) -> tuple[str, ...]:
    if one is None or other is None:
        return ()
    names = dict.fromkeys([*one.conditions, *other.conditions, "unit"])
    values = {name: tuple(_condition(figure, name) for figure in (one, other)) for name in names}
    return tuple(
        f"{name} {values[name][0]} / {values[name][1]}"
        for name in names
        if name not in COMPARED and values[name][0] != values[name][1]
    )


def _condition(figure: Figure, name: str) -> Any:
    return figure.unit if name == "unit" else figure.conditions.get(name, "not said")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
