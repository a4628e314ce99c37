"""The layerwise flow-matching loss, and its breakdown by group.

Normalisation, on which the paper is silent: squared errors are averaged, not summed, over a latent's elements [D], and
samples are averaged, so a learning rate does not depend on the image size, the batch or K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlowLoss:
    """The loss of a batch and what each group contributed; ``(per_group * counts).sum() / B`` is ``total``.

    Attributes:
        total: Scalar to call ``backward`` on: the mean over the samples.
        per_group: Mean over each group's samples, shape (K,), detached, for the logs; 0 where ``counts`` is 0.
        counts: Samples of each group, shape (K,), int64.
        per_sample: Mean over each sample's elements, shape (B,), to build another sum from.
    """

    total: Tensor
    per_group: Tensor
    counts: Tensor
    per_sample: Tensor


def layerwise_flow_loss(v: Tensor, u: Tensor, groups: Tensor, num_groups: int) -> FlowLoss:
    """Return the loss ``|| v_k(x_t, t, context) - u ||^2``, averaged over elements and samples.

    The paper sums the groups' expectations, ``sum over k of E || v_k - u ||^2``. In a balanced batch (see
    ``timesteps.balanced_groups``) the mean over samples is 1/K of that sum [D]: the same gradient direction, and a
    number comparable between different K. Out of balance a group weighs by its samples.

    Args:
        v: Predicted velocities, shape (B, ...), row i by the expert of ``groups[i]``.
        u: Target velocities, the shape of ``v``.
        groups: Group of each sample, shape (B,), int64 in [0, K).
        num_groups: K.

    Returns:
        The loss in float32, or in float64 if ``v`` or ``u`` is, on the device of ``v``.

    Raises:
        ValueError: If ``v`` and ``u`` differ in shape, ``groups`` is not of shape (B,), or the batch is empty.
        IndexError: If a group does not exist (on a GPU: a device assertion).
    """
    if v.shape != u.shape:
        raise ValueError(f"v and u must have one shape, not {tuple(v.shape)} and {tuple(u.shape)}")
    if v.numel() == 0 or groups.shape != v.shape[:1]:
        raise ValueError(f"groups must hold one group a sample, not {tuple(groups.shape)} for v {tuple(v.shape)}")
    # bfloat16 has 8 bits: it would round the squared errors' mean to about 1%.
    dtype = torch.promote_types(torch.result_type(v, u), torch.float32)
    per_sample = (v.to(dtype) - u.to(dtype)).square().reshape(len(v), -1).mean(dim=1)

    counts = torch.zeros(num_groups, dtype=torch.int64, device=v.device)
    counts = counts.index_add(0, groups, torch.ones_like(groups))
    # index_add, not a product with a mask: one sample's NaN must show in its own group only.
    sums = torch.zeros(num_groups, dtype=dtype, device=v.device).index_add(0, groups, per_sample.detach())
    return FlowLoss(per_sample.mean(), sums / counts.clamp(min=1), counts, per_sample)
