"""Where each sample's files stand inside a tar shard, found once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from latteflow.errors import UserError


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard: the files whose paths are equal up to the first dot of the file's name."""

    keys: tuple[str, ...]
    """In the order in which they stand in the shard."""
    members: tuple[dict[str, tuple[int, int]], ...]
    """A sample's files by what follows that dot, in lower case: where its bytes begin, and how many they are."""


def tar_index(shard: Path, folder: Path | None = None) -> TarIndex:
    """Return a shard's index, from ``folder`` where it was kept and the shard is still of that size and time.

    Raises:
        UserError: the shard is not a plain tar, is cut short, or holds a file twice.
    """
    try:
        state = shard.stat()
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read ({error.strerror})") from error
    stamp = {"format": 1, "bytes": state.st_size, "modified": state.st_mtime_ns}
    kept = None if folder is None else folder / f"{shard.stem}-{_digest(shard)}.json"
    found = None if kept is None else _read(kept, stamp)
    if found is not None:
        return found
    index = _scan(shard)
    if kept is not None:
        _write(kept, {**stamp, "samples": list(zip(index.keys, index.members, strict=True))})
    return index


def _scan(shard: Path) -> TarIndex:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # which would keep every header in memory
                where, _, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, kind = base.partition(".")
                if not member.isreg() or member.issparse() or not stem or not dot or _is_about_the_shard(base):
                    continue
                files = samples.setdefault(f"{where}/{stem}" if where else stem, {})
                if kind.lower() in files:
                    raise UserError(f"shard {shard} holds {member.name} twice: make it anew")
                files[kind.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"shard {shard} cannot be read ({error}): it has to be a whole, uncompressed tar; fetch or make it anew"
        ) from error
    return TarIndex(tuple(samples), tuple(samples.values()))


def _is_about_the_shard(base: str) -> bool:
    """Tell names such as ``__meta__.json``, which the webdataset library reads over too."""
    return base.startswith("__") and "__" in base[2:]


def _read(kept: Path, stamp: dict[str, int]) -> TarIndex | None:
    try:
        values = json.loads(kept.read_text())
        if {name: values[name] for name in stamp} != stamp:
            return None
        members = tuple({kind: (at, size) for kind, (at, size) in files.items()} for _, files in values["samples"])
        return TarIndex(tuple(key for key, _ in values["samples"]), members)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # nothing is lost: it is found anew


def _write(kept: Path, values: dict[str, object]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f".{kept.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values, separators=(",", ":")))
    os.replace(partial, kept)


def _digest(shard: Path) -> str:
    return hashlib.sha256(os.fsencode(shard.resolve())).hexdigest()[:12]
