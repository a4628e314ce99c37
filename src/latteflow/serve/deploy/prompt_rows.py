"""Prompts from a file, a row a picture; rows that cannot be drawn are told apart, and stop nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from latteflow.errors import UserError

_LONGEST_PROMPT = 8000
_MOST_SEED = 2**63


@dataclass(frozen=True)
class PromptRow:
    """One picture to draw."""

    row: int
    """Its place in the file, from 0; bad rows count."""
    prompt: str
    seed: int


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be drawn."""

    row: int
    reason: str


def read_rows(file: Path, seed: int) -> tuple[list[PromptRow], list[BadRow]]:
    """Return the rows of a file, and those that are none.

    Args:
        file: ``.csv`` with a head, ``.jsonl`` or ``.parquet``; the column ``prompt`` says what to draw, ``seed``, where
            there is one, from which noise. Other columns are left alone.
        seed: row i without a seed of its own has this plus i.

    Raises:
        UserError: there is no such file, it cannot be read, is of another kind, or has no column ``prompt``.
    """
    readers = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file} is of no kind that is read: give {', '.join(readers)}")
    rows: list[PromptRow] = []
    bad: list[BadRow] = []
    try:
        for number, values in enumerate(reader(file)):
            found = _row(number, values, seed)
            if isinstance(found, PromptRow):
                rows.append(found)
            else:
                bad.append(found)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}): give an intact file") from error
    return rows, bad


def _row(number: int, values: Any, seed: int) -> PromptRow | BadRow:
    """Return a row, or why it is none; ``values`` may be anything."""
    if not isinstance(values, dict):
        return BadRow(number, str(values) if isinstance(values, _Broken) else "no object with a prompt")
    prompt, own = values.get("prompt"), values.get("seed")
    if not isinstance(prompt, str) or not prompt.strip():
        return BadRow(number, "no prompt")
    if len(prompt) > _LONGEST_PROMPT:
        return BadRow(number, f"a prompt of more than {_LONGEST_PROMPT} characters")
    if own is None or own == "":
        return PromptRow(number, prompt, (seed + number) % _MOST_SEED)
    if isinstance(own, str) and own.isascii() and own.isdecimal():
        own = int(own[:20])
    if not isinstance(own, int) or isinstance(own, bool) or not 0 <= own < _MOST_SEED:
        return BadRow(number, "a seed that is not 0 to 2**63 - 1")
    return PromptRow(number, prompt, own)


class _Broken(str):
    """Why a row could not be read at all."""


def _csv(file: Path) -> Iterator[Any]:
    with file.open(newline="", encoding="utf-8-sig") as text:
        reader = csv.DictReader(text)
        _check_columns(file, reader.fieldnames or ())
        for values in reader:
            # The reader fills up short rows with None, and puts what is too much under None.
            broken = None in values or None in values.values()
            yield _Broken("more or fewer cells than the head") if broken else values


def _json_lines(file: Path) -> Iterator[Any]:
    with file.open("rb") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield _Broken("no JSON")


def _parquet(file: Path) -> Iterator[Any]:
    with parquet.ParquetFile(file) as table:
        _check_columns(file, table.schema_arrow.names)
        columns = [name for name in ("prompt", "seed") if name in table.schema_arrow.names]
        for batch in table.iter_batches(columns=columns):
            yield from batch.to_pylist()


def _check_columns(file: Path, columns: Any) -> None:
    if "prompt" not in columns:
        raise UserError(f"{file} has no column 'prompt': it has {', '.join(map(str, columns)) or 'none'}")
