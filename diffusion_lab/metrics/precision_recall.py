r"""Precision and recall of a set of images: how many look real, and how much of the real there is.

Around every point of a set, a ball that reaches its k-th nearest neighbour in that set; the union of the balls stands
for the manifold the set was drawn from. Then

    precision    share of the samples that lie in the manifold of the real images          fidelity
    recall       share of the real images that lie in the manifold of the samples          diversity

Both depend on the number of points and on k, so only sets of equal sizes compare. Distances are computed in blocks of
rows.

References:
    Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019, eqs. 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096


def precision_recall(samples: Tensor, real: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Return precision and recall, each in [0, 1].

    Args:
        samples: Features of the samples `(N, F)`.
        real: Features of real images `(M, F)`.
        k: Which neighbour a ball reaches, the point itself not counted; the paper's choice is 3.

    Raises:
        ValueError: If the features do not fit, or a set has no k-th neighbour.
    """
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise ValueError(
            f"features (N, F) and (M, F) are needed, got {tuple(samples.shape)} and {tuple(real.shape)}"
        )
    if not 1 <= k < min(len(samples), len(real)):
        raise ValueError(f"k={k} needs sets of more than k points, got {len(samples)} and {len(real)}")
    return _share_inside(samples, real, k), _share_inside(real, samples, k)


def _share_inside(points: Tensor, of: Tensor, k: int) -> float:
    """Share of `points` inside the manifold of the set `of`."""
    # the nearest of a point in its own set is itself, at distance 0
    reach = torch.cat([_distances(rows, of).kthvalue(k + 1, dim=1).values for rows in of.split(ROWS)])
    inside = [(_distances(rows, of) <= reach).any(dim=1) for rows in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the product form loses the digits that near neighbours differ in
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
