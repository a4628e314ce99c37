"""Recipe files: YAML merged with ``key=value`` overrides by OmegaConf, and what is wrong with one, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from latteflow.errors import UserError


def read_values(path: Path, overrides: Sequence[str] = (), more: Mapping[str, Any] | None = None) -> Any:
    """Return a recipe's plain values, with ``key=value`` overrides (dotted keys) and then ``more`` merged in.

    Its ``smoke:`` block is merged before them where ``smoke=true`` is among the overrides, else left out.

    Raises:
        UserError: no such file, not YAML, or an override without ``=``.
    """
    if not path.is_file():
        raise UserError(f"no recipe {path}: give the path of a YAML file such as recipes/emoji-64/generator.yaml")
    try:
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise UserError(_unreadable(path, error)) from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is not a recipe: its top level has to be keys and values")
    return merged_values(config, overrides, more, str(path))


def merged_values(
    config: DictConfig | Mapping[str, Any], overrides: Sequence[str], more: Mapping[str, Any] | None, name: str
) -> Any:
    """Return what ``read_values`` returns, of values that are there already.

    Args:
        config: the values.
        overrides: ``key=value``.
        more: nested values that come last.
        name: of the recipe, for messages.

    Raises:
        UserError: an override without ``=``, or values that cannot be merged.
    """
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise UserError(f"override {override!r} is not of the form key=value")
    try:
        base = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
        extra = OmegaConf.from_dotlist(list(overrides))
        smoke = base.pop("smoke", {})
        parts = [smoke, extra] if extra.pop("smoke", False) else [extra]
        return OmegaConf.to_container(OmegaConf.merge(base, *parts, dict(more or {})), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(_unreadable(name, error)) from error


def explained(error: ValidationError, known_keys: Collection[str], stages: Collection[str] = ()) -> str:
    """Return the first mistake that pydantic found, in one line.

    Args:
        error: pydantic's.
        known_keys: of all sections; the nearest one is offered for a key that is not known.
        stages: names that stand before a key in pydantic's words where stages tell recipes apart.
    """
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if location and location[0] in stages:
        location = location[1:]  # the discriminator's own level
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], sorted(known_keys), n=1)
        return f"unknown key {key!r}" + (f": did you mean {nearest[0]!r}?" if nearest else "")
    whole = first["type"] == "missing" or isinstance(first["input"], Mapping)
    given = "" if whole else f" (given: {first['input']!r})"
    return f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}{given}"


def _unreadable(name: str | Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{name} cannot be read as a recipe: {reason}"
