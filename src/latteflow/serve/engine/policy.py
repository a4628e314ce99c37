"""Who goes next: the fullest group first, and nobody passed over for too long.

Pictures of one expert and one size can share a forward; a step costs little more for eight than for one. Serving the
oldest picture first would run small forwards and lose that. Serving the fullest group alone would let a lonely picture
starve, so a picture that was passed over ``patience`` times goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from latteflow.serve.engine.drawing import Drawing


def choose(
    drawings: Sequence[Drawing], kind: Callable[[Drawing], Hashable], *, max_batch: int, patience: int
) -> list[Drawing]:
    """Return the pictures of the next forward, one or more of one kind, and count for all others that they waited.

    Args:
        drawings: all that are under way, in the order they came; one at least.
        kind: what those that share a forward have in common.
        max_batch: how many can.
        patience: forwards that may pass a picture over before its kind goes first.
    """
    kinds: dict[Hashable, list[Drawing]] = {}
    for drawing in drawings:
        kinds.setdefault(kind(drawing), []).append(drawing)
    longest = max(drawings, key=lambda drawing: drawing.passed_over)  # the earliest of several
    if longest.passed_over >= patience:
        chosen = kinds[kind(longest)]
    else:
        # Of equally full ones that which is furthest on its way: it is the first to make room.
        chosen = max(kinds.values(), key=lambda members: (min(len(members), max_batch), max(d.t for d in members)))
    chosen = sorted(chosen, key=lambda drawing: -drawing.passed_over)[:max_batch]
    for drawing in drawings:
        drawing.passed_over += 1
    for drawing in chosen:
        drawing.passed_over = 0
    return chosen
