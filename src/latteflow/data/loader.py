"""Which samples a step sees: a pure function of seed and step, so that resuming needs no loader state."""

from __future__ import annotations

import hashlib

import torch


def generator_of(seed: int, *key: int | str) -> torch.Generator:
    """Return a CPU generator that depends on nothing but ``seed`` and ``key`` (the step, the purpose, ...)."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch_indices(step: int, *, number: int, batch_size: int, seed: int) -> torch.Tensor:
    """Return the sample indices of training step ``step``, int64, (batch_size,).

    Every epoch is a fresh permutation of all ``number`` samples; a batch may run over from one epoch into the next,
    so no sample is ever dropped.
    """
    first = step * batch_size
    epochs = range(first // number, (first + batch_size - 1) // number + 1)
    order = torch.cat([torch.randperm(number, generator=generator_of(seed, "epoch", epoch)) for epoch in epochs])
    start = first - epochs[0] * number
    return order[start : start + batch_size]


def kept_apart(number: int, validation: int) -> torch.Tensor:
    """Return which samples of a source are kept for validation, bool (number,).

    They are drawn from all over the source, which may be sorted by class, and follow from the two numbers alone: every
    run and process keeps the same. A larger ``validation`` keeps those of a smaller one too.
    """
    apart = torch.zeros(number, dtype=torch.bool)
    apart[torch.randperm(number, generator=generator_of(0, "validation"))[:validation]] = True
    return apart
