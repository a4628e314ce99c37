"""Runs of single groups to one pipeline: where groups share no weight, each can be trained by itself, and put together.

Nothing is computed: each group's averaged weights are copied from the run that trained it, so that the result is, to
the bit, what one run of all groups would have left.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from latteflow.errors import UserError
from latteflow.models.transformer import LatteFlowTransformer

_FREE = {
    "output",
    "data.path",  # other pictures have other latent statistics
    "data.cache",
    *(f"train.{key}" for key in ("log_every", "preview_every", "checkpoint_every", "keep_checkpoints", "tracker")),
    *(f"train.{key}" for key in ("strategy", "activation_checkpointing", "compile", "workers", "cpu_threads")),
    *(f"generator.{key}" for key in ("autoencoder", "backbone", "groups", "preview_prompts", "guidance_scale")),
}
"""What runs may differ in: places and habits. The frozen parts are compared by what they hold, not by where they were.
"""


@dataclass(frozen=True)
class _Run:
    folder: Path
    """Of the final weights."""
    recipe: dict[str, Any]

    @property
    def groups(self) -> list[int]:
        return self.recipe["generator"]["groups"]


def merge_runs(runs: Sequence[Path], out: Path) -> Path:
    """Put the groups that several runs have trained together into one pipeline.

    Args:
        runs: their output folders, or the ``final`` folders in them.
        out: a folder that is not there yet; it is complete or not at all.

    Raises:
        UserError: a run is not finished or not of single groups, the groups are not all there once, or the runs differ
            in anything that the weights depend on.
    """
    if out.exists():
        raise UserError(f"{out} is there already: give another folder, or move it away")
    found = [_read(folder) for folder in runs]
    _check_groups(found)
    for other in found[1:]:
        _check_alike(found[0], other)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(found[0].folder, partial, ignore=shutil.ignore_patterns("recipe.json"))
    _write_groups(found, partial / "transformer")
    recipe = {**found[0].recipe, "output": str(out)}
    recipe["generator"] = {**recipe["generator"], "groups": None}
    (partial / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    os.replace(partial, out)
    return out


def _read(folder: Path) -> _Run:
    folder = folder / "final" if (folder / "final").is_dir() else folder
    if not (folder / "recipe.json").is_file():
        raise UserError(f"no finished run in {folder}: give the output folder of one, or the `final` folder in it")
    try:
        recipe = json.loads((folder / "recipe.json").read_text())
        generator = recipe.get("generator")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'recipe.json'} cannot be read: {error}") from error
    if generator is None:
        raise UserError(f"{folder} is of the {recipe.get('stage')} stage: only a generator has groups")
    if generator["shared_io"]:
        raise UserError(
            f"{folder} cannot be merged: its groups share patch embedding, time embedding and head "
            "(generator.shared_io: true), which every run would have trained its own way; "
            "train each group with generator.shared_io=false"
        )
    if generator.get("lora"):
        raise UserError(
            f"{folder} has trained adapters (generator.lora), which need no merging: load the `lora` folder of each run"
        )
    if generator["groups"] is None:
        raise UserError(f"{folder} has trained all groups together (generator.groups is not set): nothing to merge")
    return _Run(folder, recipe)


def _check_groups(runs: Sequence[_Run]) -> None:
    """Refuse a group that no run, or more than one run, has trained."""
    for group in range(runs[0].recipe["generator"]["num_groups"]):
        trained = [str(run.folder) for run in runs if group in run.groups]
        if len(trained) != 1:
            raise UserError(
                f"group {group} is in no run: train it with generator.groups=[{group}]"
                if not trained
                else f"group {group} is in {' and '.join(trained)}: leave out all but one"
            )


def _check_alike(one: _Run, other: _Run) -> None:
    mine, theirs = dict(_leaves(one.recipe)), dict(_leaves(other.recipe))
    for key in sorted({*mine, *theirs} - _FREE):
        if key.partition(".")[0] == "encode":  # what it wrote is among the data
            continue
        _require_same(key, mine.get(key), theirs.get(key), one, other)
    files = _files(one.folder)
    for file in sorted({*files, *_files(other.folder)}):
        pair = (one.folder / file, other.folder / file)
        for path in pair:
            if not path.is_file():
                raise UserError(f"runs differ: there is no {path}")
        if file.suffix == ".json":
            values = [dict(_leaves(_without_versions(json.loads(path.read_text())))) for path in pair]
            for key in sorted({*values[0], *values[1]}):
                _require_same(f"{file}: {key}", values[0].get(key), values[1].get(key), one, other)
        elif not filecmp.cmp(*pair, shallow=False):
            name = _differing_tensor(*pair) if file.suffix == ".safetensors" else ""
            if name is not None:
                raise UserError(f"runs differ: {pair[0]} and {pair[1]} are not the same{name and f' ({name})'}")


def _require_same(what: str, mine: Any, theirs: Any, one: _Run, other: _Run) -> None:
    if mine != theirs:
        raise UserError(f"runs differ in {what}: {mine} in {one.folder}, {theirs} in {other.folder}")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; a list is a value."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, part in value.items():
        yield from _leaves(part, f"{key}.{name}" if key else name)


def _without_versions(value: Any) -> Any:
    """Leave out what libraries write about themselves and about where they read from."""
    if not isinstance(value, Mapping):
        return value
    kept = {k: v for k, v in value.items() if not k.startswith("_") and k != "transformers_version"}
    return {name: _without_versions(part) for name, part in kept.items()}


def _files(folder: Path) -> set[Path]:
    """Return the files, relative, that runs of the same settings have in common: all but the trained weights."""
    files = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    return files - {Path("recipe.json")} - {Path("transformer") / shard for shard in _shards(folder / "transformer")}


def _shards(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def _differing_tensor(one: Path, other: Path) -> str | None:
    """Return the first name whose tensors differ, None where only the files' headers do."""
    with safe_open(one, "pt") as mine, safe_open(other, "pt") as theirs:
        names = {*mine.keys(), *theirs.keys()}
        for name in sorted(names):
            if name not in mine.keys() or name not in theirs.keys():  # noqa: SIM118
                return name
            if not torch.equal(mine.get_tensor(name), theirs.get_tensor(name)):
                return name
    return None


def _write_groups(runs: Sequence[_Run], folder: Path) -> None:
    """Write each of the replica's weights from the run that has trained it."""
    source = {group: run for run in runs for group in run.groups}
    owner = _owners(json.loads((folder / "config.json").read_text()))
    for shard in _shards(folder):
        try:
            tensors = dict(_chosen(shard, owner, source))
        except (OSError, SafetensorError) as error:
            raise UserError(f"weights of {shard} cannot be read: {error}") from error
        save_file(tensors, folder / shard, metadata={"format": "pt"})


def _chosen(shard: str, owner: Mapping[str, int], source: Mapping[int, _Run]) -> Iterable[tuple[str, torch.Tensor]]:
    for group, run in source.items():
        with safe_open(run.folder / "transformer" / shard, "pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys() if owner[name] == group)  # noqa: SIM118


def _owners(config: dict[str, Any]) -> dict[str, int]:
    """Return the group of each of the replica's weights."""
    with torch.device("meta"):
        replica: Any = LatteFlowTransformer.from_config(config)
    names = {id(parameter): name for name, parameter in replica.named_parameters()}
    return {
        names[id(parameter)]: group
        for group in range(replica.config.num_groups)
        for module in (*(replica.layers[number] for number in replica.layers_of(group)), replica.io[group])
        for parameter in module.parameters()
    }
