r"""The Fréchet distance of two Gaussians, also with singular covariances.

    d^2 = |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^{1/2}

The last trace is the sum of the square roots of the eigenvalues of the product C_1 C_2. Taken literally it is
fragile: a rank-deficient covariance (fewer images than features) has eigenvalues that are zero but for rounding, of
either sign or complex, and a root turns 1e-16 into 1e-8. The same numbers are the singular values of C_1^{1/2}
C_2^{1/2}, for

    eig(C_1 C_2) = eig(C_1^{1/2} C_2 C_1^{1/2}) = eig(A A^T),   A = C_1^{1/2} C_2^{1/2},   sqrt(eig(A A^T)) = sv(A),

which need no root afterwards. The symmetric roots come from eigendecompositions in which whatever lies below the
rounding of the largest eigenvalue is zero. For C_1 = C_2 the result vanishes to rounding, at any rank.

Always computed in float64 on the CPU, so that a number does not depend on the machine that made the features.

References:
    Dowson & Landau, "The Fréchet distance between multivariate normal distributions", 1982, eq. 4.
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017 (FID).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.metrics.stats import GaussianStats, gaussian_stats

__all__ = ["GaussianStats", "frechet_distance", "frechet_from_stats", "gaussian_stats", "symmetric_root"]


def symmetric_root(cov: Tensor) -> Tensor:
    """Return the symmetric square root `(d, d)` of a positive semi-definite matrix; rounding noise counts as zero."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    noise = values[-1].clamp(min=0) * cov.shape[0] * torch.finfo(cov.dtype).eps
    roots = torch.where(values > noise, values, 0.0).sqrt()
    return (vectors * roots) @ vectors.T


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return the squared Fréchet distance of N(mean1, cov1) and N(mean2, cov2): the number called FID of its features.

    Args:
        mean1: `(d,)`.
        cov1: `(d, d)`, symmetric positive semi-definite, of any rank.
        mean2: `(d,)`.
        cov2: `(d, d)`.

    Raises:
        ValueError: If the shapes do not fit, or a value is not finite.
    """
    dim = mean1.shape[0] if mean1.ndim == 1 else -1
    shapes = [tuple(x.shape) for x in (mean1, cov1, mean2, cov2)]
    if shapes != [(dim,), (dim, dim)] * 2:
        raise ValueError(f"two Gaussians of one dimension need (d,), (d, d), (d,), (d, d), not {shapes}")
    m1, c1, m2, c2 = (x.detach().to("cpu", torch.float64) for x in (mean1, cov1, mean2, cov2))
    if not all(torch.isfinite(x).all() for x in (m1, c1, m2, c2)):
        raise ValueError("the Gaussians hold values that are not finite")
    cross = torch.linalg.svdvals(symmetric_root(c1) @ symmetric_root(c2)).sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2.0 * cross
    return max(distance.item(), 0.0)  # it is a square: what is below zero is rounding


def frechet_from_stats(first: GaussianStats, second: GaussianStats) -> float:
    """Return the squared Fréchet distance of two accumulated Gaussians.

    Raises:
        ValueError: If one of them saw fewer than two features, or their dimensions differ.
    """
    return frechet_distance(first.mean, first.cov, second.mean, second.cov)
