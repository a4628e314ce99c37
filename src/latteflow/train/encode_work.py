"""One shard's work: pictures to latents, captions to contexts. Whoever does it, and when, the bytes are the same."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from latteflow.data.contexts import context_file, write_contexts
from latteflow.data.latents import DTYPES, Encoded, check_made_with, latent_shard_entry, shard_file, write_latents
from latteflow.data.shards import ShardDamaged, sha256_of, verified_shard
from latteflow.data.sizes import Size, as_input, fitted, nearest_size
from latteflow.data.sources.source import BadSample, Sample, Source
from latteflow.errors import UserError
from latteflow.models.autoencoder import encode_pictures
from latteflow.models.context import compute_context, concatenate
from latteflow.train.encode_parts import device_named, load_encoder, load_prompter

_UNCHANGED: Any = SimpleNamespace(latents_mean=(), latents_std=())  # spread and mean are the trainer's business
_log = logging.getLogger(__name__)

Items = Iterable[tuple[str, Callable[[], Sample]]]
"""Names of samples, and what reads each."""


@dataclass
class LatentWork:
    """Latent shards of a source. Goes to other processes as it is; each loads the autoencoder for itself."""

    folder: Path
    source: Source | None
    """None where samples are handed in, as those of a stream are."""
    autoencoder: str
    revision: str | None
    sizes: Sequence[Size]
    shard_size: int
    batch_size: int
    dtype: str
    made_with: dict[str, Any]
    device: str = "auto"
    readers: int = 4
    cpu_threads: int = 1
    _vae: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_vae": None}

    def load(self, vae: Any = None) -> None:
        """Load the autoencoder, or take the one that is there.

        Raises:
            UserError: it cannot be loaded, or is another than the run began with.
        """
        self._device = device_named(self.device)
        if vae is None:
            vae, identity = load_encoder(self.autoencoder, self.revision)
            if identity["sha256"] != self.made_with["autoencoder.sha256"]:
                raise UserError(f"autoencoder {self.autoencoder} is another on this machine than where the run began")
        self._vae = vae.to(self._device)

    def names(self, number: int) -> list[str] | None:
        """Return the names of a shard's samples, where they are known ahead."""
        if self.source is None:
            return None
        return [self.source.name(i) for i in self._range(number)]

    def _range(self, number: int) -> range:
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, len(self.source or ())))

    def written(self, number: int) -> dict[str, Any] | None:
        """Return the entry of a shard that is there, every byte verified; None where it is to be written.

        Raises:
            UserError: it was made otherwise.
        """
        return _entry_if_whole(
            shard_file(self.folder, number),
            lambda file: latent_shard_entry(file, self.made_with, self.names(number)),
        )

    def __call__(
        self, number: int, items: Items | None = None, tick: Callable[[int], None] = lambda n: None
    ) -> dict[str, Any]:
        """Write a shard, unless it is there, and return its entry.

        Args:
            number: of the shard.
            items: its samples; left out, the source's.
            tick: called with a number of samples as they are done.
        """
        entry = self.written(number)
        if entry is None:
            if items is None and self.source is not None:
                items = [(self.source.name(i), partial(self.source.read, i)) for i in self._range(number)]
            with _threads(self.cpu_threads):
                samples = self._encoded(items or (), tick)
            file = shard_file(self.folder, number)
            write_latents(file, samples, self.sizes, self.made_with)
            entry = latent_shard_entry(file, self.made_with, self.names(number))
        return entry

    def _encoded(self, items: Items, tick: Callable[[int], None]) -> Encoded:
        latents: dict[int, torch.Tensor] = {}
        waiting: dict[int, list[tuple[int, torch.Tensor]]] = {bucket: [] for bucket in range(len(self.sizes))}
        names, captions, buckets, skipped = [], [], [], []
        for place, (name, found) in enumerate(_read_ahead(items, self._prepared, self.readers, 2 * self.batch_size)):
            try:
                bucket, pixels, caption = found.result()
            except BadSample as bad:
                skipped.append((place, name, str(bad)))
                continue
            waiting[bucket].append((len(names), pixels))
            names.append(name)
            captions.append(caption)
            buckets.append(bucket)
            if len(waiting[bucket]) == self.batch_size:
                latents |= self._batch(waiting[bucket], names)
                tick(len(waiting[bucket]))
                waiting[bucket] = []
        for rest in waiting.values():
            if rest:
                latents |= self._batch(rest, names)
                tick(len(rest))
        tick(len(skipped))
        return Encoded(names, captions, buckets, [latents[i] for i in range(len(names))], skipped)

    def _prepared(self, read: Callable[[], Sample]) -> tuple[int, torch.Tensor, str]:
        """Read a sample, in a thread: its bucket, its pixels at that size, its caption."""
        sample = read()
        bucket = nearest_size(*sample.picture.size, self.sizes)
        return bucket, fitted(sample.picture, self.sizes[bucket]), sample.caption

    @torch.no_grad()
    def _batch(self, batch: Sequence[tuple[int, torch.Tensor]], names: Sequence[str]) -> dict[int, torch.Tensor]:
        pictures = as_input(torch.stack([pixels for _, pixels in batch])).to(self._device)
        latents = encode_pictures(self._vae, _UNCHANGED, pictures).cpu().to(DTYPES[self.dtype])
        for (number, _), latent in zip(batch, latents, strict=True):
            if not bool(latent.isfinite().all()):
                raise UserError(
                    f"the latent of {names[number]} is not finite in {self.dtype}: try another encode.dtype"
                )
        return {number: latent for (number, _), latent in zip(batch, latents, strict=True)}


@dataclass
class ContextWork:
    """Shards of prompts' contexts."""

    folder: Path
    backbone: str
    revision: str | None
    batch_size: int
    made_with: dict[str, Any]
    device: str = "auto"
    cpu_threads: int = 1
    _parts: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None}

    def load(self, parts: tuple[Any, Any] | None = None) -> None:
        """Load backbone and processor, or take those that are there.

        Raises:
            UserError: they cannot be loaded, or are others than the run began with.
        """
        self._device = device_named(self.device)
        if parts is None:
            backbone, processor, identity = load_prompter(self.backbone, self.revision)
            if identity["sha256"] != self.made_with["backbone.sha256"]:
                raise UserError(f"backbone {self.backbone} is another on this machine than where the run began")
            parts = backbone, processor
        self._parts = parts[0].to(self._device), parts[1]

    def __call__(self, item: tuple[int, Sequence[str]]) -> dict[str, Any]:
        """Write the shard of a number and its captions, unless it is there, and return its entry."""
        number, captions = item
        file = context_file(self.folder, number)
        made_with = {**self.made_with, "captions": list(captions)}

        def whole(file: Path) -> dict[str, Any]:
            _, about = verified_shard(file)
            check_made_with(file, about["made_with"], made_with)
            size, digest = file.stat().st_size, sha256_of(file)
            return {"file": file.name, "captions": len(captions), "bytes": size, "sha256": digest}

        entry = _entry_if_whole(file, whole)
        if entry is None:
            with _threads(self.cpu_threads):
                found = [
                    self._contexts(captions[i : i + self.batch_size]) for i in range(0, len(captions), self.batch_size)
                ]
            write_contexts(file, concatenate(found), made_with)
            entry = whole(file)
        return entry

    def _contexts(self, captions: Sequence[str]) -> Any:
        """Return what ``LatteFlowPipeline.encode_prompt`` returns."""
        backbone, processor = self._parts
        texts = [processor.chat_prompt(caption) for caption in captions]
        words = processor(texts, padding_side="right").to(self._device)
        return compute_context(backbone, words["input_ids"], words["attention_mask"]).to("cpu", torch.bfloat16)


def _entry_if_whole(file: Path, entry: Callable[[Path], dict[str, Any]]) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        return entry(file)
    except ShardDamaged as damage:
        _log.warning("%s: it is made anew", damage)
        return None


def _read_ahead(
    items: Items, read: Callable[[Callable[[], Sample]], Any], readers: int, ahead: int
) -> Iterator[tuple[str, Future[Any]]]:
    """Yield items in their order, the next ones being read in threads meanwhile."""
    with ThreadPoolExecutor(readers) as pool:
        waiting: deque[tuple[str, Future[Any]]] = deque()
        try:
            for name, sample in items:
                waiting.append((name, pool.submit(read, sample)))
                if len(waiting) > ahead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, found in waiting:
                found.cancel()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute on that many CPU threads: the last bits of a result may hang on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
