"""Prompt contexts ahead of training: the backbone's keys and values of every caption, each caption once.

A class name is many pictures' caption: its context is computed and kept once. Number 0 is the empty prompt, whose
context guidance needs.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latteflow.data.shards import ShardDamaged, open_shard, tensors_sha256, write_shard
from latteflow.errors import UserError
from latteflow.models.context import Context

_PROBE = "A probe: 1 caption, <two> words."


def backbone_identity(backbone: nn.Module, processor: Any, name: str, revision: str | None = None) -> dict[str, Any]:
    """Return what says which backbone contexts are of: name, revision, and a hash of its weights and of its prompts."""
    [words] = processor([processor.chat_prompt(_PROBE)], padding_side="right")["input_ids"]
    tensors = {**backbone.state_dict(), "prompt": words}
    return {"name": name, "revision": revision, "sha256": tensors_sha256(tensors)}


def write_contexts(file: Path, context: Context, made_with: Mapping[str, Any]) -> None:
    """Write one shard of contexts, bfloat16, one prompt's tokens after the other, without padding.

    ``made_with`` holds what they depend on, the captions among it.

    Raises:
        OSError: it cannot be written.
    """
    keep = context.mask
    tensors = {
        # (B, layers, heads, T, d) to (tokens, layers, heads, d)
        "keys": context.keys.movedim(3, 1)[keep].to(torch.bfloat16),
        "values": context.values.movedim(3, 1)[keep].to(torch.bfloat16),
        "ends": keep.sum(1).cumsum(0),
        "next_position": context.next_position.to(torch.int64),
    }
    write_shard(file, tensors, {"made_with": made_with})


def context_file(folder: Path, number: int) -> Path:
    """Return where a shard of contexts is."""
    return folder / f"contexts-{number:05d}.safetensors"


def numbers_file(folder: Path) -> Path:
    """Return where it is written which context is which sample's."""
    return folder / "context-numbers.safetensors"


class ContextShards:
    """The contexts of a folder's captions.

    Args:
        folder: of the latents.
        manifest: its manifest's part about contexts.

    Raises:
        UserError: a file is missing or not whole.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        for entry in (*manifest["shards"], manifest["numbers"]):
            file = folder / entry["file"]
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise UserError(f"{file} is missing or not whole: run `latteflow encode` again, which makes it anew")
        self._ends = list(itertools.accumulate(entry["captions"] for entry in manifest["shards"]))
        self._opened: dict[str, dict[str, torch.Tensor]] = {}

    def require(self, backbone: Mapping[str, Any]) -> None:
        """Refuse contexts of another backbone.

        Args:
            backbone: what ``backbone_identity`` says of the one they are to be of.

        Raises:
            UserError: they are of another; both are named.
        """
        theirs = self.manifest["backbone"]
        if theirs["sha256"] != backbone["sha256"]:
            named = [f"{one['name']!r} (sha256 {one['sha256'][:12]})" for one in (theirs, backbone)]
            raise UserError(
                f"the contexts in {self.folder} are of backbone {named[0]}, and the recipe's is {named[1]}: encode "
                "anew into another folder, or change generator.backbone"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def files(self) -> list[tuple[Path, str]]:
        """Return every file and its hash."""
        entries = (*self.manifest["shards"], self.manifest["numbers"])
        return [(self.folder / entry["file"], entry["sha256"]) for entry in entries]

    def numbers(self, index: torch.Tensor) -> torch.Tensor:
        """Return which contexts are those of samples ``index``, int64."""
        return self._open(self.manifest["numbers"]["file"])["numbers"][index]

    def read(self, numbers: torch.Tensor) -> Context:
        """Return contexts, bfloat16, padded at the end to the longest."""
        parts = [self._one(number) for number in numbers.tolist()]
        lengths = torch.tensor([len(keys) for keys, _, _ in parts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]

        def padded(which: int) -> torch.Tensor:
            rows = nn.utils.rnn.pad_sequence([part[which] for part in parts], batch_first=True)
            return rows.movedim(1, 3)

        return Context(padded(0), padded(1), mask, torch.stack([position for _, _, position in parts]))

    def _one(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        which = bisect_right(self._ends, number)
        at = number - (self._ends[which - 1] if which else 0)
        shard = self._open(self.manifest["shards"][which]["file"])
        tokens = slice(int(shard["ends"][at - 1]) if at else 0, int(shard["ends"][at]))
        return shard["keys"][tokens], shard["values"][tokens], shard["next_position"][at]

    def _open(self, file: str) -> dict[str, torch.Tensor]:
        if file not in self._opened:
            try:
                self._opened[file], _ = open_shard(self.folder / file)
            except ShardDamaged as error:
                raise UserError(f"{error}: delete it and encode again") from error
        return self._opened[file]
