r"""Denoisers in closed form: the test bench on which samplers, losses and guidance are proved.

Gaussian data, x0 ~ N(m, S):

    E[x0 | x] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (x - alpha m).

Mixture of Gaussians, component k with weight w_k, mean m_k and diagonal covariance S_k:

    r_k = softmax_k [ log w_k + log N(x; alpha m_k, alpha^2 S_k + sigma^2) ],
    E[x0 | x] = sum_k r_k ( m_k + alpha S_k (alpha^2 S_k + sigma^2)^-1 (x - alpha m_k) ).

Empirical data are the mixture of zero-width components: E[x0 | x] = sum_i r_i x_i, the optimum that a network
trained on these examples would memorise.

Conditioning on a label keeps the components that carry it; a label of -1, like `cond=None`, keeps them all.

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, appendix B.3 (empirical).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import NO_LABEL, Cond


class GaussianDenoiser:
    """Exact denoiser of x0 ~ N(mean, covariance).

    Args:
        mean: `(*D)`.
        covariance: 0-d (isotropic), `(*D)` (diagonal), or `(n, n)` with n the number of elements of `mean` (full).
        interpolant: The process.

    Raises:
        ValueError: If the covariance has another shape, or a negative eigenvalue.
    """

    def __init__(self, *, mean: Tensor, covariance: Tensor, interpolant: Interpolant) -> None:
        self.interpolant, self.mean = interpolant, mean
        n = mean.numel()
        self._basis: Tensor | None = None
        if covariance.ndim == 0 or covariance.shape == mean.shape:
            self._variances = covariance.expand(mean.shape).reshape(n)
        elif covariance.shape == (n, n):
            self._variances, self._basis = torch.linalg.eigh(covariance)
            # eigh of a singular matrix returns tiny negatives, tiny beside the largest eigenvalue
            size = self._variances.abs()
            rounding = n * torch.finfo(size.dtype).eps * size.max()
            self._variances = torch.where(size <= rounding, 0.0, self._variances)
        else:
            raise ValueError(
                f"covariance of shape {tuple(covariance.shape)} fits a mean of shape {tuple(mean.shape)} neither as a "
                "scalar, nor as a diagonal, nor as a full matrix"
            )
        if bool((self._variances < 0).any()):
            raise ValueError("covariance has a negative eigenvalue")

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return E[x0 | x], shape of `x` `(B, *D)`; `logsnr` is 0-d or `(B,)`, `cond` is ignored."""
        alpha, sigma = self.interpolant(expand_logsnr(logsnr, x))
        alpha, sigma = alpha.to(x.dtype)[:, None], sigma.to(x.dtype)[:, None]
        mean = self.mean.to(x).reshape(1, -1)
        residual = x.flatten(1) - alpha * mean
        variances = self._variances.to(x)
        # alpha S / (alpha^2 S + sigma^2), written so that S = 0 at sigma = 0 gives 0 and not 0 / 0
        total = alpha**2 * variances + sigma**2
        gain = torch.where(variances > 0, alpha * variances / total, torch.zeros_like(total))
        if self._basis is None:
            shift = gain * residual
        else:
            basis = self._basis.to(x)
            shift = (gain * (residual @ basis)) @ basis.T
        return (mean + shift).reshape(x.shape)


class GaussianMixtureDenoiser:
    """Exact denoiser, density and sampler of a mixture of Gaussians, optionally with labels.

    Args:
        means: `(K, *D)`.
        variances: `(K,)` isotropic or `(K, *D)` diagonal; zero is allowed for denoising.
        weights: `(K,)`, positive; normalised here.
        labels: `(K,)` int64, the class of each component, or None.
        interpolant: The process.

    Raises:
        ValueError: If shapes disagree, a weight is not positive, a variance is negative, or (at call) a label is
            asked for that no component has.
    """

    def __init__(
        self,
        *,
        means: Tensor,
        variances: Tensor,
        weights: Tensor,
        labels: Tensor | None = None,
        interpolant: Interpolant,
    ) -> None:
        K = means.shape[0]
        if weights.shape != (K,) or variances.shape not in ((K,), tuple(means.shape)):
            raise ValueError(
                "a mixture of K components needs weights (K,) and variances (K,) or of the shape of means"
            )
        if bool((weights <= 0).any()) or bool((variances < 0).any()):
            raise ValueError("a mixture needs positive weights and non-negative variances")
        if labels is not None and labels.shape != (K,):
            raise ValueError("a mixture of K components needs labels (K,)")
        self.interpolant, self.labels = interpolant, labels
        self.shape = tuple(means.shape[1:])
        self.means = means.reshape(K, -1)
        self.variances = (
            variances.reshape(K, -1).expand(K, self.means.shape[1])
            if variances.ndim > 1
            else variances[:, None].expand(K, self.means.shape[1])
        )
        self.log_weights = torch.log(weights / weights.sum())

    def _component_logits(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond | None) -> Tensor:
        """Unnormalised log posterior (B, K) of the component, log w_k + log N(x; alpha m_k, alpha^2 S_k + sigma^2)."""
        total = alpha[..., None] ** 2 * self.variances.to(x) + sigma[..., None] ** 2
        distance = (x[:, None] - alpha[..., None] * self.means.to(x)) ** 2
        log_normal = -0.5 * (distance / total + torch.log(total) + math.log(2 * math.pi)).sum(-1)
        logits = self.log_weights.to(x) + log_normal
        if cond is None or "label" not in cond or self.labels is None:
            return logits
        asked = cond["label"].to(x.device)[:, None]
        keep = (asked == self.labels.to(x.device)[None]) | (asked == NO_LABEL)
        if not bool(keep.any(1).all()):
            raise ValueError("a label was asked for that no component of the mixture has")
        return logits.masked_fill(~keep, -torch.inf)

    def _levels(self, logsnr: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.interpolant(expand_logsnr(logsnr, x))
        return alpha.to(x.dtype)[:, None], sigma.to(x.dtype)[:, None]

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return E[x0 | x, label], shape of `x` `(B, *D)`; `logsnr` is 0-d or `(B,)`."""
        flat = x.flatten(1)
        alpha, sigma = self._levels(logsnr, x)
        responsibilities = torch.softmax(self._component_logits(flat, alpha, sigma, cond), dim=1)
        variances, means = self.variances.to(x), self.means.to(x)
        total = alpha[..., None] ** 2 * variances + sigma[..., None] ** 2
        gain = torch.where(variances > 0, alpha[..., None] * variances / total, torch.zeros_like(total))
        posterior_means = means + gain * (flat[:, None] - alpha[..., None] * means)
        return (responsibilities[..., None] * posterior_means).sum(1).reshape(x.shape)

    def log_density(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return log q(x) at noise level `logsnr` (+inf: of the data), `(B,)`, in nats.

        With a label it is log q(x | label).
        """
        alpha, sigma = self._levels(logsnr, x)
        joint = torch.logsumexp(self._component_logits(x.flatten(1), alpha, sigma, cond), dim=1)
        if cond is None or "label" not in cond or self.labels is None:
            return joint
        asked = cond["label"].to(x.device)[:, None]
        keep = (asked == self.labels.to(x.device)[None]) | (asked == NO_LABEL)
        prior = self.log_weights.to(x).expand(keep.shape).masked_fill(~keep, -torch.inf)
        return joint - torch.logsumexp(prior, dim=1)

    def score(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return grad log q(x) = (alpha E[x0 | x] - x) / sigma^2 at a finite noise level, shape of `x`."""
        alpha, sigma = (broadcast_right(c[:, 0], x) for c in self._levels(logsnr, x))
        return (alpha * self(x, logsnr, cond) - x) / sigma**2

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw `n` clean examples; return `(x0 (n, *D), labels (n,) or None)`."""
        component = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=rng)
        noise = torch.randn((n, self.means.shape[1]), generator=rng, dtype=self.means.dtype)
        x0 = self.means[component] + self.variances[component].sqrt() * noise
        return x0.reshape(n, *self.shape), None if self.labels is None else self.labels[component]


class EmpiricalDenoiser:
    """Exact denoiser of a finite set of examples: it can only return averages of them.

    Args:
        data: `(N, *D)` examples.
        labels: `(N,)` int64, or None.
        interpolant: The process.

    Raises:
        ValueError: If there are no examples, shapes disagree, or (at call) a label is asked for that no example has.
    """

    def __init__(self, *, data: Tensor, labels: Tensor | None = None, interpolant: Interpolant) -> None:
        if data.shape[0] == 0 or (labels is not None and labels.shape != data.shape[:1]):
            raise ValueError("EmpiricalDenoiser needs at least one example, and one label for each if any")
        self.interpolant, self.labels = interpolant, labels
        self.data = data.flatten(1)

    @property
    def classes(self) -> Sequence[int]:
        """The labels that occur, in order."""
        return [] if self.labels is None else [int(v) for v in self.labels.unique()]

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return E[x0 | x, label], shape of `x` `(B, *D)`; `logsnr` is 0-d or `(B,)`, finite or -inf."""
        alpha, sigma = self.interpolant(expand_logsnr(logsnr, x))
        alpha, sigma = alpha.to(x.dtype)[:, None], sigma.to(x.dtype)[:, None]
        data, flat = self.data.to(x), x.flatten(1)
        # -|x - alpha x_i|^2 / (2 sigma^2) without the part that all i share; the ratios are bounded as sigma grows
        logits = (alpha / sigma) * (flat / sigma @ data.T) - 0.5 * (alpha / sigma) ** 2 * (data**2).sum(1)
        if cond is not None and "label" in cond and self.labels is not None:
            asked = cond["label"].to(x.device)[:, None]
            keep = (asked == self.labels.to(x.device)[None]) | (asked == NO_LABEL)
            if not bool(keep.any(1).all()):
                raise ValueError("a label was asked for that no example of the set has")
            logits = logits.masked_fill(~keep, -torch.inf)
        return (torch.softmax(logits, dim=1) @ data).reshape(x.shape)
