"""Bad samples do not end a run, nor bend it: each is left out, written down, and replaced by one drawn for it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from latteflow.data.loader import generator_of
from latteflow.data.sources.source import BadSample, Sample, Source
from latteflow.errors import UserError

_log = logging.getLogger(__name__)


class Quarantined:
    """A source whose bad samples are replaced.

    The replacement follows from the epoch and the index, and from which samples are bad and which may stand in:
    whichever process reads it, and whenever, it is the same. Several processes may write to one folder.

    Args:
        source: where samples come from.
        folder: ``quarantine.jsonl`` is written there, a line a bad sample: its name and what is wrong with it. What a
            former run wrote counts; without the file, all samples are tried again.
        limit: the share of samples that may be bad.

    Raises:
        UserError: more are, by the file that is there.
    """

    def __init__(self, source: Source, folder: str | Path, limit: float = 0.01) -> None:
        self.source, self.limit = source, limit
        self.file = Path(folder) / "quarantine.jsonl"
        self._known: dict[str, str] = {}
        self._seen = 0  # bytes of the file
        self._catch_up()
        self._check()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def bad(self) -> Mapping[str, str]:
        """The bad samples that are known of so far, by name, and what is wrong with each."""
        return MappingProxyType(self._known)

    def name(self, index: int) -> str:
        """Return what a sample is called."""
        return self.source.name(index)

    def read(self, index: int, epoch: int, among: torch.Tensor | None = None) -> Sample:
        """Return a sample, or what stands in for it.

        Args:
            index: of the sample.
            epoch: in another, another stands in.
            among: int64, the indices of those that may stand in; left out, all.

        Raises:
            UserError: more samples are bad than the limit allows.
        """
        return self.resolve(index, epoch, among)[1]

    def resolve(self, index: int, epoch: int, among: torch.Tensor | None = None) -> tuple[int, Sample]:
        """Return the index that was read in the end, and its sample; takes and raises what ``read`` does."""
        sample = self.good(index)
        if sample is not None:
            return index, sample
        others = torch.arange(len(self.source)) if among is None else among
        order = torch.randperm(len(others), generator=generator_of(0, "replacement", epoch, index))
        for other in map(int, others[order]):
            sample = self.good(other)
            if sample is not None:
                return other, sample
        raise UserError(f"none of the {len(others)} samples can be read: see {self.file}")

    def good(self, index: int) -> Sample | None:
        """Return a sample, or None where it is bad.

        Raises:
            UserError: more samples are bad than the limit allows.
        """
        name = self.source.name(index)
        if name in self._known:
            return None
        try:
            return self.source.read(index)
        except BadSample as bad:
            self._leave_out(name, str(bad))
            return None

    def _leave_out(self, name: str, reason: str) -> None:
        _log.warning("%s is left out: %s", name, reason)
        self._catch_up()
        if name not in self._known:  # another process may have been faster
            line = json.dumps({"name": name, "reason": reason}) + "\n"
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())  # at once: lines of several processes do not mix
            finally:
                os.close(descriptor)
            self._known[name] = reason
        self._check(name)

    def _catch_up(self) -> None:
        """Read what has been added to the file, by whomever."""
        try:
            with self.file.open("rb") as lines:
                lines.seek(self._seen)
                added = lines.read()
        except FileNotFoundError:
            return
        added = added[: added.rfind(b"\n") + 1]  # a line that is being written is read next time
        self._seen += len(added)
        for line in added.splitlines():
            try:
                entry = json.loads(line)
                self._known[str(entry["name"])] = str(entry["reason"])
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a crash: that sample is found, and written down, once more

    def _check(self, last: str | None = None) -> None:
        number = len(self._known)
        if number > self.limit * len(self.source):
            name = last or next(reversed(self._known))
            raise UserError(
                f"{number} of {len(self.source)} samples are bad, more than quarantine_limit={self.limit:g} allows; "
                f"the last: {name} ({self._known[name]}). Mend or remove what {self.file} lists, delete that file, "
                "and start again"
            )
