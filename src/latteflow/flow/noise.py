"""Where a path starts: noise that depends on the seed and the picture's number alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from latteflow.errors import UserError


def initial_noise(
    shape: Sequence[int], number: int, generator: torch.Generator | Sequence[torch.Generator] | None
) -> torch.Tensor:
    """Return float32 noise (number, *shape) on the CPU, drawn picture by picture: none depends on its batch. [D]

    Args:
        shape: of one picture's latents.
        number: pictures.
        generator: picture i draws with ``initial_seed() + i`` of a single generator, which is left as it was, or with
            generator i of a list; None takes a seed from torch's own.

    Raises:
        UserError: a list of another length.
    """
    generators = _one_each(generator, number)
    return torch.stack([torch.randn(tuple(shape), generator=one, device=one.device).cpu() for one in generators])


def _one_each(generator: torch.Generator | Sequence[torch.Generator] | None, number: int) -> list[torch.Generator]:
    if isinstance(generator, torch.Generator) or generator is None:
        seed = int(torch.randint(2**62, ())) if generator is None else generator.initial_seed()
        return [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(number)]
    if len(generator) != number:
        raise UserError(f"{len(generator)} generators for {number} pictures: give one, or one each")
    return list(generator)
