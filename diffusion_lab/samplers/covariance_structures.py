r"""What may be assumed of the covariance V of p(x0 | x), and how noise of that covariance is drawn.

V is known through products u -> V u alone, and each costs a forward pass. Three structures make one product enough:
they take V to be diagonal in a basis Q of cosines, with some entries of the diagonal d equal,

    u = Q^T r, r random signs,      d = mean over equal entries of r * (Q V u),      V^(1/2) xi ~ Q^T (sqrt(d) * Q xi).

E[r * (Q V Q^T r)] is the diagonal of Q V Q^T; what is off the diagonal is the estimate's noise, so a single draw is
exact where Q diagonalises V. `Lanczos` assumes nothing and takes m products: with f(V) = V^(1/2) and V Q_m ~ Q_m T,
Q_m from the vectors xi, V xi, ... and T tridiagonal,

    V^(1/2) xi ~ |xi| Q_m T^(1/2) e_1,      exact at m = the number of elements of x0.

A structure is a class with the two methods of `CovarianceStructure`.

References:
    Schioppa & Salimans, "Covariance-aware Sampling for Diffusion Models", 2026 (cosine bases; details are ours).
    Bekas, Kokiopoulou & Saad, "An Estimator for the Diagonal of a Matrix", 2007.
    Chow & Saad, "Preconditioned Krylov Subspace Methods for Sampling Multivariate Gaussian Distributions", 2014.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.dct import block_dct, block_idct, dct, idct

Product = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`product(u) -> (E[x0 | x], V u)`, shapes of x; one forward pass."""

Clip = Callable[[Tensor], Tensor]
"""Bring estimated variances into their legal range; keeps the shape."""


@runtime_checkable
class CovarianceStructure(Protocol):
    """A way to draw noise of the covariance V of p(x0 | x)."""

    def draw(self, product: Product, x: Tensor, rng: SampleRNG, clip: Clip) -> tuple[Tensor, Tensor]:
        """Return E[x0 | x] and a draw from N(0, V), shapes of `x` `(B, *D)`.

        Args:
            product: Gives both from a vector; call it at least once.
            x: Noisy samples.
            rng: Noise of each sample.
            clip: For estimated variances `(B, ...)` in the structure's own basis, after averaging.
        """
        ...

    def draw_prior(self, variance: Tensor, x: Tensor, rng: SampleRNG) -> Tensor:
        """Return a draw from N(0, V); V has the known `variance`, 0-d or an entry each, in the structure's basis."""
        ...


def signs_like(x: Tensor, rng: SampleRNG) -> Tensor:
    """Return independent -1 or 1 with probability one half, like `x`."""
    # float32 in every precision, so that a float64 run has the same signs
    return (2 * (rng.rand(x.shape[1:], device=x.device) < 0.5) - 1).to(x.dtype)


def band_means(d: Tensor) -> Tensor:
    """Replace each entry of `d` `(..., n, m)` by the mean over frequencies of its radius.

    The radius of (k, l) is sqrt((k / n)^2 + (l / m)^2) max(n, m), rounded to a whole number: rings of width one.
    """
    n, m = d.shape[-2:]
    k, l = torch.arange(n, dtype=torch.float64)[:, None] / n, torch.arange(m, dtype=torch.float64) / m
    ring = torch.round(max(n, m) * torch.sqrt(k**2 + l**2)).long().flatten()
    # a product, not a scatter: it adds in the same order on every device
    member = torch.nn.functional.one_hot(ring).to(d)
    member = member[:, member.any(0)]
    means = d.flatten(-2) @ (member / member.sum(0)) @ member.T
    return means.reshape(d.shape)


class Diagonal(ABC):
    """V diagonal in an orthonormal basis, some entries equal. One product."""

    @abstractmethod
    def to_basis(self, x: Tensor) -> Tensor:
        """Return Q x, `(B, *F)`."""

    @abstractmethod
    def from_basis(self, y: Tensor) -> Tensor:
        """Return Q^T y."""

    @abstractmethod
    def average(self, d: Tensor) -> Tensor:
        """Return the means of `d` `(B, *F)` over entries presumed equal, broadcastable to it."""

    def draw(self, product: Product, x: Tensor, rng: SampleRNG, clip: Clip) -> tuple[Tensor, Tensor]:
        """See `CovarianceStructure.draw`."""
        r = signs_like(self.to_basis(x), rng)
        x0, Vu = product(self.from_basis(r))
        # averaged before it is clipped: single estimates fall below zero by chance, and cutting these off is a bias
        d = clip(self.average(r * self.to_basis(Vu)))
        return x0, self.from_basis(torch.sqrt(d) * self.to_basis(rng.randn_like(x)))

    def draw_prior(self, variance: Tensor, x: Tensor, rng: SampleRNG) -> Tensor:
        """See `CovarianceStructure.draw_prior`."""
        return self.from_basis(torch.sqrt(variance) * self.to_basis(rng.randn_like(x)))

    def variances(self, x0: Tensor) -> Tensor:
        """Return the variance of clean data `(n, *D)` along each vector of the basis, `(*F)` or broadcastable to it."""
        return self.average(self.to_basis(x0).var(dim=0)[None])[0]


def _is_image(x: Tensor) -> bool:
    return x.ndim >= 4


@dataclass(frozen=True, kw_only=True)
class WholeImage(Diagonal):
    """V diagonal in the cosines of the whole image (last two axes), or of a vector's or sequence's last axis.

    Attributes:
        channels: Whether all channels share their variances.
        bands: Whether frequencies of about the same radius share theirs; see `band_means`. Images only.
    """

    channels: bool = False
    bands: bool = False

    def to_basis(self, x: Tensor) -> Tensor:
        """Return the transform of each channel, shape of `x`."""
        return dct(x, axes=2 if _is_image(x) else 1)

    def from_basis(self, y: Tensor) -> Tensor:
        """Undo it."""
        return idct(y, axes=2 if _is_image(y) else 1)

    def average(self, d: Tensor) -> Tensor:
        """See `Diagonal.average`."""
        if not _is_image(d):
            return d
        d = d.mean(-3, keepdim=True) if self.channels else d
        return band_means(d) if self.bands else d


@dataclass(frozen=True, kw_only=True)
class Blocks(Diagonal):
    """V diagonal in the cosines of square blocks, all blocks alike. A vector has no blocks and is taken as one.

    Attributes:
        size: Side of a block; must divide the sides of the image.
        channels: Whether all channels share their variances.
        bands: Whether frequencies of about the same radius share theirs; see `band_means`.
    """

    size: int = 8
    channels: bool = False
    bands: bool = False

    def to_basis(self, x: Tensor) -> Tensor:
        """Return `(..., C, H / p, W / p, p, p)` for images.

        Raises:
            ValueError: If the blocks do not fit.
        """
        return block_dct(x, self.size) if _is_image(x) else dct(x, axes=1)

    def from_basis(self, y: Tensor) -> Tensor:
        """Undo it."""
        return block_idct(y) if _is_image(y) else idct(y, axes=1)

    def average(self, d: Tensor) -> Tensor:
        """See `Diagonal.average`."""
        if not _is_image(d):
            return d
        d = d.mean((-5, -4, -3) if self.channels else (-4, -3), keepdim=True)
        return band_means(d) if self.bands else d


@dataclass(frozen=True, kw_only=True)
class Scalar(WholeImage):
    """V a multiple of the identity; the cosines only make the estimate of its trace more exact."""

    def average(self, d: Tensor) -> Tensor:
        """See `Diagonal.average`."""
        return d.mean((-3, -2, -1) if _is_image(d) else -1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Lanczos:
    """Any V, by `products` steps of Lanczos' method: the reference for the cheap structures.

    Attributes:
        products: m, each a forward pass with its derivative.

    Raises:
        ValueError: If it is below one.
    """

    products: int = 3

    def __post_init__(self) -> None:
        if self.products < 1:
            raise ValueError(f"Lanczos needs at least one product, got {self.products}")

    def draw(self, product: Product, x: Tensor, rng: SampleRNG, clip: Clip) -> tuple[Tensor, Tensor]:
        """See `CovarianceStructure.draw`; what is clipped are the eigenvalues of T."""
        xi = rng.randn_like(x).flatten(1)
        B, n = xi.shape
        length = xi.norm(dim=1, keepdim=True)
        m = min(self.products, n)
        Q, T = xi.new_zeros(B, m, n), xi.new_zeros(B, m, m)
        q = xi / length
        x0 = x
        for j in range(m):
            Q[:, j] = q
            x0, Vq = product(q.reshape(x.shape))
            w = Vq.flatten(1)
            T[:, j, j] = (w * q).sum(1)
            # twice against all earlier vectors: a learned Jacobian is not symmetric, and rounding undoes orthogonality
            for _ in range(2):
                w = w - ((Q @ w[..., None]).transpose(1, 2) @ Q)[:, 0]
            off = w.norm(dim=1)
            if j + 1 < m:
                T[:, j, j + 1] = T[:, j + 1, j] = off
                # an exhausted space goes on with zeros, or with rounding errors that `off` keeps out of the result
                q = w / torch.where(off > 0, off, 1.0)[:, None]
        values, vectors = torch.linalg.eigh(T)
        root_e1 = (vectors * torch.sqrt(clip(values))[:, None]) @ vectors[:, 0, :, None]
        return x0, (length * (root_e1.transpose(1, 2) @ Q)[:, 0]).reshape(x.shape)

    def draw_prior(self, variance: Tensor, x: Tensor, rng: SampleRNG) -> Tensor:
        """See `CovarianceStructure.draw_prior`; `variance` is 0-d."""
        return torch.sqrt(variance) * rng.randn_like(x)


StructureName = Literal["full", "block", "scalar", "lanczos"]


def named_structure(
    name: StructureName, *, block: int, channels: bool, bands: bool, products: int
) -> CovarianceStructure:
    """Return a structure by the name that a config gives it.

    Raises:
        ValueError: If there is none of that name.
    """
    if name == "full":
        return WholeImage(channels=channels, bands=bands)
    if name == "block":
        return Blocks(size=block, channels=channels, bands=bands)
    if name == "scalar":
        return Scalar()
    if name == "lanczos":
        return Lanczos(products=products)
    raise ValueError(f"no covariance structure '{name}': full, block, scalar, lanczos, or an object")
