"""The strip under a drawing that shows which expert ran at which step, and what each of them took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
"""Okabe and Ito's, which people with any kind of colour vision can tell apart; after eight groups they come again."""

STYLE = """
.strip-steps {display: flex; gap: 1px; height: 2rem; border-radius: 6px; overflow: hidden;
  background: var(--background-fill-secondary);}
.strip-steps span {flex: 1 1 0; min-width: 1px;}
.strip-experts {display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; margin: 0.5rem 0 0; padding: 0; list-style: none;
  font-size: 0.85rem;}
.strip-experts i {display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 3px; margin-right: 0.35rem;
  vertical-align: -0.08rem;}
"""
"""CSS of the strip."""


@dataclass(frozen=True)
class Step:
    """A step that was made, as the API tells it."""

    step: int
    """From 1."""
    steps: int
    """Of the whole drawing."""
    group: int
    t: float
    seconds: float
    batch: int
    """Drawings that shared the forward."""


def strip(made: Sequence[Step], edges: Sequence[float]) -> str:
    """Return the strip as HTML.

    Args:
        made: the steps so far.
        edges: of the experts' intervals, one more than there are groups.
    """
    if not made:
        return ""
    cells = [
        f'<span style="background:{_colour(step.group)}" title="step {step.step}: expert {step.group + 1}, '
        f't = {step.t:.3f}, {_milliseconds(step.seconds)}{_shared(step.batch)}"></span>'
        for step in made
    ]
    cells += ["<span></span>"] * (made[-1].steps - len(made))
    experts = [_expert(group, edges, made) for group in range(len(edges) - 1)]
    said = f"{len(made)} of {made[-1].steps} steps; " + "; ".join(words for words, _ in experts)
    return (
        f'<div class="strip-steps" role="img" aria-label="{escape(said)}">{"".join(cells)}</div>'
        f'<ul class="strip-experts">{"".join(item for _, item in experts)}</ul>'
    )


def _expert(group: int, edges: Sequence[float], made: Sequence[Step]) -> tuple[str, str]:
    """Return what an expert did, in words and as an item of a list."""
    own = [step for step in made if step.group == group]
    words = f"expert {group + 1}, t {edges[group]:g} to {edges[group + 1]:g}: "
    words += f"{len(own)} steps, {_milliseconds(sum(step.seconds for step in own))}" if own else "waiting"
    return words, f'<li><i style="background:{_colour(group)}"></i>{escape(words)}</li>'


def _colour(group: int) -> str:
    return _COLOURS[group % len(_COLOURS)]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"


def _shared(batch: int) -> str:
    return f", shared with {batch - 1} other{'s' if batch > 2 else ''}" if batch > 1 else ""
