"""Kills a training run at every file operation of a checkpoint's save, and lets it go on: run by ``test_kill.py``.

    python killed.py FOLDER

One interpreter imports torch and forks a child for each point; it trains nothing itself and has one thread, so that
forking is safe. What was found is written to ``FOLDER/found.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from test_loop import Regression, recipe

from latteflow.train import checkpoint
from latteflow.train.checkpoint import newest_checkpoint
from latteflow.train.loop import train

SETTINGS = {"steps": 8, "checkpoint_every": 2, "preview_every": 99, "keep_checkpoints": 2}
OPERATIONS: list[tuple[Any, str]] = [
    (checkpoint, "save_file"),
    (torch, "save"),
    (Path, "write_text"),
    (Path, "mkdir"),
    (os, "fsync"),
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
    (shutil, "rmtree"),
]
MOMENTS = ("before", "half way", "after")
"""Half way through what writes a file, half of it is there."""


class Saving:
    """Counts the moments of the operations of one save, and may end the process at one of them.

    Args:
        number: of the save, counted from 1.
        fatal: the moment that kills, counted from 1; none if 0.
    """

    def __init__(self, number: int, fatal: int) -> None:
        self.number, self.fatal = number, fatal
        self.saves, self.inside = 0, False
        self.moments: list[str] = []

    def patch(self) -> None:
        """Take the place of the operations, and of the save that they are counted in."""
        for owner, name in OPERATIONS:
            setattr(owner, name, self.watched(name, getattr(owner, name)))
        save = sys.modules["latteflow.train.loop"].save_checkpoint  # type: ignore[attr-defined]

        def saved(*given: Any, **named: Any) -> Any:
            self.saves += 1
            self.inside = self.saves == self.number
            try:
                return save(*given, **named)
            finally:
                self.inside = False

        sys.modules["latteflow.train.loop"].save_checkpoint = saved  # type: ignore[attr-defined]

    def watched(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            self.at(f"before {name}")
            if name in ("save_file", "save", "write_text"):
                self.at(f"half way {name}", lambda: halve(operation, given, named))
            done = operation(*given, **named)
            self.at(f"after {name}")
            return done

        return run

    def at(self, moment: str, first: Callable[[], None] = lambda: None) -> None:
        if not self.inside:
            return
        self.moments.append(moment)
        if len(self.moments) == self.fatal:
            self.inside = False
            first()
            os.kill(os.getpid(), signal.SIGKILL)


def halve(operation: Callable[..., Any], given: Any, named: Any) -> None:
    """Write a file and cut it."""
    operation(*given, **named)
    target = next(thing for thing in given if isinstance(thing, Path) or hasattr(thing, "fileno"))
    path = target if isinstance(target, Path) else Path(target.name)
    if not isinstance(target, Path):
        target.flush()
    os.truncate(path, path.stat().st_size // 2)


def forked(work: Callable[[], None]) -> int:
    """Do some work in a child; return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        work()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def train_to(output: Path, file: Path | None = None, saving: Saving | None = None) -> None:
    """Train, and write down the moments of the watched save."""
    if saving is not None:
        saving.patch()
    train(recipe(output, **SETTINGS), Regression(noise=0.5))
    if saving is not None and file is not None:
        file.write_text(json.dumps(saving.moments))


def main() -> None:
    """Kill at every moment of the third save, at step 6: two older checkpoints are there, one is to be removed."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    assert forked(lambda: train_to(folder / "straight", folder / "moments.json", Saving(3, 0))) == 0
    moments = json.loads((folder / "moments.json").read_text())
    found = []
    for fatal, moment in enumerate(moments, start=1):
        output = folder / f"run-{fatal}"
        status = forked(lambda output=output, fatal=fatal: train_to(output, None, Saving(3, fatal)))
        newest = newest_checkpoint(output)
        found.append({"moment": moment, "signal": os.WTERMSIG(status), "newest": newest and newest.name})
        found[-1]["resumed"] = forked(lambda output=output: train_to(output))
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
