"""The small trained models that ship inside the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def embedded_models() -> dict[str, Path]:
    """Return the embedded models' folders by name."""
    root = Path(str(files("latteflow") / "weights"))
    return {folder.name: folder for folder in sorted(root.glob("*")) if (folder / "model_index.json").is_file()}


def resolve_model(name: str) -> str:
    """Return the folder of an embedded model, or ``name`` itself where it is a folder or a hub id."""
    folder = embedded_models().get(name)
    return name if folder is None else str(folder)
