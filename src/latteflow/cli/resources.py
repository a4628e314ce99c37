"""What a worker of Ray's takes, as it is typed."""

from __future__ import annotations

from latteflow.errors import UserError


def read_resources(text: str, option: str) -> dict[str, float]:
    """Return amounts by name from ``CPU=4,GPU=1``.

    Args:
        text: as it was typed.
        option: that it was typed after.

    Raises:
        UserError: it is not of that form.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, _, amount = part.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            found[""] = 0.0
    if "" in found or not all(amount > 0 for amount in found.values()):
        raise UserError(f"{option} {text} is not of the form CPU=4,GPU=1")
    return found
