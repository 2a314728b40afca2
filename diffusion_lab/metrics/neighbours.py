r"""Who is near whom in two sets of features: fidelity and diversity by the balls of nearest neighbours.

Around every point of a set, a ball that reaches its k-th nearest neighbour in that set; the union of the balls stands
for the manifold the set was drawn from. Then

    precision    share of the samples that lie in the manifold of the real images          fidelity
    recall       share of the real images that lie in the manifold of the samples          diversity
    density      how many real balls a sample lies in, over k, on average                  fidelity, 1 for real images
    coverage     share of the real images whose ball holds a sample                        diversity

All depend on the number of points and on k, so only sets of equal sizes compare. A lone real image far from the others
has a great ball that makes precision too good; density weighs it as one of many, and coverage asks only for the balls
of real images, so that far samples cannot improve it.

Squared distances are |a|^2 + |b|^2 - 2 a b in float64, of features whose mean is taken off first, in blocks of rows of
a bounded size. What is below the rounding of that difference counts as equal: a copy is at distance zero, and a point
on the surface of a ball is inside.

References:
    Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019, eqs. 1 and 2.
    Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020, eqs. 3 to 5 (the text's closed
    balls; the authors' code has open ones).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CELLS = 1 << 23
"""Distances in one block, 64 MiB."""

COLUMNS = 4096
"""Rows of the second set that are wide at a time."""


class Manifolds(NamedTuple):
    """Fidelity and diversity of samples; precision, recall and coverage in [0, 1], density above 0."""

    precision: float
    recall: float
    density: float
    coverage: float


class Block(NamedTuple):
    """Distances of some rows of `a` to all rows of `b`.

    Attributes:
        start: Index of the first row in `a`.
        squares: `(rows, M)` squared distances, float64.
        slack: What of a squared distance is rounding.
    """

    start: int
    squares: Tensor
    slack: float


def distances(a: Tensor, b: Tensor) -> Iterator[Block]:
    """Yield the squared distances of `(N, F)` to `(M, F)` in blocks of rows.

    Raises:
        ValueError: If the features do not fit, or a set is empty.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features (N, F) and (M, F) are needed, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not len(a) or not len(b):
        raise ValueError(f"distances of {len(a)} to {len(b)} points: there are none")
    middle = torch.stack([part.double().sum(dim=0) for part in b.split(COLUMNS)]).sum(dim=0) / len(b)
    norms_a, norms_b = (
        torch.cat([(part.double() - middle).square().sum(dim=1) for part in x.split(COLUMNS)]) for x in (a, b)
    )
    # rounding errors of a sum of F products add up like a random walk
    slack = (
        8 * a.shape[1] ** 0.5 * torch.finfo(torch.float64).eps * float(torch.cat([norms_a, norms_b]).max())
    )
    rows = max(1, CELLS // max(len(b), b.shape[1]))
    for start in range(0, len(a), rows):
        part = a[start : start + rows].double() - middle
        squares = norms_a[start : start + rows, None] + norms_b
        for column in range(0, len(b), COLUMNS):
            other = b[column : column + COLUMNS].double() - middle
            squares[:, column : column + COLUMNS] -= 2.0 * (part @ other.T)
        squares[squares <= slack] = 0.0
        yield Block(start, squares, slack)


def nearest(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Return the distances `(N, k)` of each row of `a` to its k nearest rows of `b`, ascending, float64.

    Raises:
        ValueError: If the features do not fit, or there are fewer than k rows in `b`.
    """
    if not 1 <= k <= len(b):
        raise ValueError(f"{k} nearest neighbours need as many points, there are {len(b)}")
    return torch.cat([block.squares.topk(k, dim=1, largest=False).values.sqrt() for block in distances(a, b)])


def reaches(points: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Return for each k the squared distances `(N,)` of points to their k-th nearest neighbours among themselves."""
    found = []
    for block in distances(points, points):
        rows = torch.arange(len(block.squares))
        block.squares[rows, block.start + rows] = torch.inf
        near = block.squares.topk(max(ks), dim=1, largest=False).values
        found.append(near[:, [k - 1 for k in ks]])
    return list(torch.cat(found).unbind(dim=1))


def precision_recall(samples: Tensor, real: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Return precision and recall, each in [0, 1].

    Args:
        samples: Features of the samples `(N, F)`.
        real: Features of real images `(M, F)`.
        k: Which neighbour a ball reaches, the point itself not counted; the paper's choice is 3.

    Raises:
        ValueError: If the features do not fit, or a set has no k-th neighbour.
    """
    found = manifolds(samples, real, k=k, k_density=k)
    return found.precision, found.recall


def manifolds(samples: Tensor, real: Tensor, *, k: int = 3, k_density: int = 5) -> Manifolds:
    """Return precision, recall, density and coverage.

    Args:
        samples: Features of the samples `(N, F)`.
        real: Features of real images `(M, F)`.
        k: Which neighbour the balls of precision and recall reach, the point itself not counted.
        k_density: The same for density and coverage.

    Raises:
        ValueError: If the features do not fit, or a set has no such neighbour.
    """
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise ValueError(
            f"features (N, F) and (M, F) are needed, got {tuple(samples.shape)} and {tuple(real.shape)}"
        )
    for what, most, points in (("k", k, (samples, real)), ("k_density", k_density, (real,))):
        if not 1 <= most < min(len(x) for x in points):
            raise ValueError(
                f"{what}={most} needs sets of more than {what} points, got {len(samples)} and {len(real)}"
            )
    of_real, of_real_dense = reaches(real, (k, k_density))
    (of_samples,) = reaches(samples, (k,))
    precise, balls = 0, 0
    recalled, covered = torch.zeros(len(real), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for start, squares, slack in distances(samples, real):
        inside = squares - slack
        precise += int((inside <= of_real).any(dim=1).sum())
        recalled |= (inside <= of_samples[start : start + len(squares), None]).any(dim=0)
        dense = inside <= of_real_dense
        balls += int(dense.sum())
        covered |= dense.any(dim=0)
    return Manifolds(
        precision=precise / len(samples),
        recall=float(recalled.double().mean()),
        density=balls / (k_density * len(samples)),
        coverage=float(covered.double().mean()),
    )
