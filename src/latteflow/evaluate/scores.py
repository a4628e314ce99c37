"""Inception score, and improved precision and recall, from class probabilities and features."""

from __future__ import annotations

import torch

from latteflow.data.loader import generator_of
from latteflow.errors import UserError
from latteflow.evaluate.moments import check_finite

NEIGHBOUR = 3
"""k: a ball reaches to its centre's k-th nearest neighbour."""
_ROUNDING = 1e-10


def inception_score(probabilities: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """Return mean and spread over splits of exp(E KL(p(y|x) || p(y))), from 1 to the number of classes.

    Pictures are shared out to splits by a fixed shuffle, so that their order (by class, say) does not matter; the
    spread is that of the splits' scores, without bias's correction, as published code has it.
    Salimans et al., 2016 (arXiv 1606.03498).

    Args:
        probabilities: of each picture's classes, (pictures, classes); rows sum to 1.
        splits: parts of equal size, or nearly.

    Raises:
        UserError: a split would hold fewer pictures than there are classes, which no score can be had from without
            bias; or rows are no probabilities.
    """
    pictures, classes = probabilities.shape
    if splits < 1 or pictures // splits < classes:
        raise UserError(
            f"a score over {classes} classes needs that many pictures in each of {splits} splits: got {pictures} "
            "pictures; take more, or fewer splits"
        )
    check_finite(probabilities)
    p = probabilities.double()
    if bool((p < 0).any()) or not torch.allclose(
        p.sum(dim=1), torch.ones((), dtype=p.dtype, device=p.device), atol=1e-4
    ):
        raise UserError("class probabilities have to be at least 0 and to sum to 1: apply softmax first")
    order = torch.randperm(pictures, generator=generator_of(0, "inception score")).to(p.device)
    scores = torch.stack([_score(p[part]) for part in order.tensor_split(splits)])
    return float(scores.mean()), float(scores.std(correction=0))


def _score(p: torch.Tensor) -> torch.Tensor:
    # xlogy, as a class without any probability adds nothing.
    of_each = torch.xlogy(p, p).sum(dim=1).mean()
    together = p.mean(dim=0)
    return (of_each - torch.xlogy(together, together).sum()).exp()


def precision_and_recall(
    real: torch.Tensor, drawn: torch.Tensor, *, k: int = NEIGHBOUR, block: int = 4096
) -> tuple[float, float]:
    """Return the share of drawn pictures within the real ones' balls, and of real ones within the drawn ones'.

    A picture's ball reaches to its k-th nearest neighbour in its own set. Kynkäänniemi et al., 2019 (arXiv 1904.06991).
    Distances are in float64; what differs by rounding counts as within.

    Args:
        real: features (pictures, values).
        drawn: features of as many values; both numbers change the figures, and should be those of what is compared.
        k: which neighbour.
        block: pictures at a time; the distances of block x block pairs are in memory.

    Raises:
        UserError: a set has no k other pictures, or features differ in number or are not finite.
    """
    if min(len(real), len(drawn)) <= k:
        raise UserError(
            f"precision and recall look at {k} neighbours: got {len(real)} real and {len(drawn)} drawn pictures; take "
            "more"
        )
    if real.shape[1] != drawn.shape[1]:
        raise UserError(
            f"features of {real.shape[1]} values cannot be compared with {drawn.shape[1]}: measure both with the same "
            "network"
        )
    for features in (real, drawn):
        check_finite(features)
    centre = real.double().mean(dim=0)  # nearer to nought, products round less
    real, drawn = real.double() - centre, drawn.double() - centre
    real_reach, drawn_reach = _reach(real, k, block), _reach(drawn, k, block)
    real_within = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    drawn_within = torch.zeros(len(drawn), dtype=torch.bool, device=real.device)
    for i in range(0, len(drawn), block):
        rows = slice(i, i + block)
        for j in range(0, len(real), block):
            columns = slice(j, j + block)
            apart, slack = _squared_distances(drawn[rows], real[columns])
            drawn_within[rows] |= (apart <= real_reach[columns] + slack).any(dim=1)
            real_within[columns] |= (apart <= drawn_reach[rows, None] + slack).any(dim=0)
    return float(drawn_within.double().mean()), float(real_within.double().mean())


def _reach(features: torch.Tensor, k: int, block: int) -> torch.Tensor:
    """Return each picture's squared distance to its k-th nearest neighbour, itself left out."""
    found = []
    for i in range(0, len(features), block):
        rows = features[i : i + block]
        nearest = torch.full((len(rows), k), torch.inf, dtype=features.dtype, device=features.device)
        for j in range(0, len(features), block):
            apart, _ = _squared_distances(rows, features[j : j + block])
            own = torch.arange(i, i + len(rows), device=apart.device)[:, None] == torch.arange(
                j, j + apart.shape[1], device=apart.device
            )
            apart.masked_fill_(own, torch.inf)
            nearest = torch.cat([nearest, apart], dim=1).topk(k, dim=1, largest=False).values
        found.append(nearest[:, -1])
    return torch.cat(found)


def _squared_distances(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared distances (rows, columns), and how much of them may be rounding."""
    sizes = one.square().sum(dim=1)[:, None] + other.square().sum(dim=1)
    return (sizes - 2 * one @ other.T).clamp_min(0), sizes * _ROUNDING
