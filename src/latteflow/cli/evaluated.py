"""What ``latteflow evaluate`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latteflow.evaluate.compare import Comparison
    from latteflow.evaluate.record import Evaluation


def print_figures(record: Evaluation) -> None:
    """Print every figure of an evaluation, by measure."""
    from latteflow.evaluate.figures import measures_in

    for measure, figures in measures_in(record.figures).items():
        print(f"{measure} ({record.seconds.get(measure, 0):.0f} s)")
        widths = [
            max(len(text) for text in texts) for texts in zip(*((one.of, one.name) for one in figures), strict=True)
        ]
        for one in figures:
            print(f"  {one.of:<{widths[0]}}  {one.name:<{widths[1]}}  {one.told}")


def print_comparison(comparison: Comparison, one: str, other: str) -> None:
    """Print two evaluations side by side, and the conditions in which they differ.

    Args:
        comparison: of the two.
        one: name of the first.
        other: name of the second.
    """
    print(f"A: {one}\nB: {other}\n")
    rows = [("measure", "of", "figure", "A", "B", "B - A")]
    for row in comparison.rows:
        values = ["" if figure is None else figure.shown for figure in (row.one, row.other)]
        rows.append((row.measure, row.of, row.name, values[0], values[1], row.verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]))
    number = sum(row.comparable for row in comparison.rows)
    print(f"\n{number} of {len(comparison.rows)} figures can be compared.")
    if comparison.differing:
        print("\nWhat differs:")
        for name, (first, second) in comparison.differing.items():
            print(f"  {name}: {first} / {second}")


def print_embedded(results: dict[str, Any]) -> None:
    """Print what ``evaluate_embedded`` found, and ``model``."""
    print(f"{results['model']}: {', '.join(f'{key} {value}' for key, value in results['conditions'].items())}")
    print(f"  autoencoder            {results['autoencoder_psnr_db']:.2f} dB PSNR")
    for key, title in (
        ("most_common_answer", "most common answer"),
        ("understanding", "real pictures"),
        ("understanding_of_the_same_pairs", "  of the pairs drawn"),
    ):
        print(f"  {title:<22} {_shares(results[key])}")
    _print_drawn(results, "")
    if "without_guidance" in results:
        print("  without guidance:")
        _print_drawn(results["without_guidance"], "  ")


def _print_drawn(results: dict[str, Any], indent: str) -> None:
    spread = {
        name: f"{100 * value['mean']:.1f}% ({100 * value['lowest']:.1f} to {100 * value['highest']:.1f})"
        for name, value in results["drawn_then_asked"].items()
    }
    width = 22 - len(indent)
    print(f"  {indent}{'drawn, then asked':<{width}} {', '.join(f'{name} {value}' for name, value in spread.items())}")
    for name in ("judge", "features"):
        if name in results:
            drawn = {key: value["mean"] for key, value in results[name]["drawn"].items()}
            print(f"  {indent}{name + ', real pictures':<{width}} {_figures(results[name]['real'])}")
            print(f"  {indent}{name + ', drawings':<{width}} {_figures(drawn)}")
            print(f"  {indent}{'  by real':<{width}} {_figures(results[name]['drawn_by_real'])}")


def _figures(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'none' if value is None else f'{value:.4g}'}" for name, value in values.items())


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}%" for name, value in shares.items())
