r"""The terms of the variational bound, as pure functions; all per example, in nats per dimension.

    -log p(x0)  <=  prior + diffusion + reconstruction,      (x_1 the noisiest, x_0 the cleanest state; lambda = logsnr)

    prior           KL( q(x_1 | x0) || N(0, I) ) = ½ mean [ alpha² x0² + sigma² - log sigma² - 1 ]   at logsnr_min
    reconstruction  E -log p(x0 | x_0),   p(level k | x_0) = softmax_k [ -½ SNR_max (y - x_k)² ],   y = x_0 / alpha_0
    diffusion       T = inf:   ½ E_{lambda ~ p} [ |eps - eps_hat|² / p(lambda) ]
                    T steps:   ½ T E_{i ~ U{1..T}} [ expm1(lambda_s - lambda_t) |eps - eps_hat|² ]

for steps from t = i / T to s = (i - 1) / T, where expm1(lambda_s - lambda_t) |eps - eps_hat|² = (SNR_s - SNR_t) |x0 -
x0_hat|². The prior is that of the variance-preserving process whatever the denoiser's interpolant is: they are one
process up to the length of x, and p(x_1) is stretched with it.

With y = x0 + s e for s = exp(-logsnr_max / 2) and d_k = x_k - x0, the softmax's logits are -½ (d_k / s)² + (d_k / s) e
up to a constant, 0 at the true level: no digits are lost where SNR_max is 10^6.

References:
    Kingma, Salimans, Poole & Ho, "Variational Diffusion Models", 2021, section 4, eqs. 11-15 and 18, appendix E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusion_lab.losses.denoising import eps_error
from diffusion_lab.typing import Cond, DenoiserFn

# numbers that the table of reconstruction logits may hold at once: 128 MiB in float32
TABLE = 2**25


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The values that the data can take: `count` of them, evenly spaced from `low` to `high`, both included.

    The house's images have level k at 2 k / 255 - 1, the defaults; VDM's have it at 2 (k + 1/2) / 256 - 1, which is
    low = -255/256 and high = 255/256.

    Raises:
        ValueError: If there are fewer than two levels or the range is empty.
    """

    count: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 2 or not self.low < self.high:
            raise ValueError(f"Levels needs count >= 2 and low < high, got {self}")

    @property
    def gap(self) -> float:
        """Distance of neighbouring levels."""
        return (self.high - self.low) / (self.count - 1)

    def positions(self, like: Tensor) -> Tensor:
        """Return all values, `(count,)`, in the dtype and on the device of `like`."""
        return self.low + self.gap * torch.arange(self.count, dtype=like.dtype, device=like.device)

    def indices(self, x0: Tensor) -> Tensor:
        """Return the level of each value of `x0`, int64.

        Raises:
            ValueError: If (on the CPU, where asking is free) a value is no level: a bound for other data is none.
        """
        place = (x0 - self.low) / self.gap
        index = place.round().clamp(0, self.count - 1)
        if x0.device.type == "cpu" and bool(((place - index).abs() > 0.02).any()):
            raise ValueError(
                f"the data are not among the {self.count} levels from {self.low} to {self.high}: the bound needs the "
                "levels of the data set, and images that no augmentation has moved off them"
            )
        return index.long()


def bits(nats: Tensor) -> Tensor:
    """Return nats in bits: nats per dimension become bits per dimension."""
    return nats / math.log(2.0)


def prior_kl(x0: Tensor, logsnr_min: Tensor) -> Tensor:
    """Return KL(q(x_1 | x0) || N(0, I)), `(B,)`, for x0 `(B, *D)` and the lowest log-SNR, 0-d."""
    signal, log_noise = torch.sigmoid(logsnr_min), F.logsigmoid(-logsnr_min)
    # sigma² - 1 = -alpha²
    return 0.5 * (signal * (x0.square().flatten(1).mean(1) - 1.0) - log_noise)


def reconstruction(x0: Tensor, eps: Tensor, logsnr_max: Tensor, levels: Levels) -> Tensor:
    """Return -log p(x0 | x_0) for the cleanest state x_0 = alpha x0 + sigma eps, `(B,)`.

    Args:
        x0: Data on the levels, `(B, *D)`.
        eps: Standard normal noise like `x0`.
        logsnr_max: The highest log-SNR, 0-d.
        levels: The values that the data can take.

    Raises:
        ValueError: If (on the CPU) the data are not on the levels.
    """
    index = levels.indices(x0).flatten(1)
    e, inverse_s = eps.flatten(1), torch.exp(0.5 * logsnr_max.to(x0.dtype))
    k = torch.arange(levels.count, device=x0.device)

    def of_rows(index: Tensor, e: Tensor, inverse_s: Tensor) -> Tensor:
        d = (levels.gap * inverse_s) * (k - index[..., None])
        return torch.logsumexp(d * (e[..., None] - 0.5 * d), dim=-1).mean(-1)

    rows = max(1, TABLE // (levels.count * max(1, index.shape[1])))
    if index.shape[0] <= rows:
        return of_rows(index, e, inverse_s)
    # the table has `count` numbers a pixel: one piece at a time, and again in the backward pass
    return torch.cat(
        [
            checkpoint(of_rows, *part, inverse_s, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
            for part in zip(index.split(rows), e.split(rows), strict=True)
        ]
    )


def continuous_diffusion(
    denoiser: DenoiserFn, x0: Tensor, eps: Tensor, logsnr: Tensor, slope: Tensor, cond: Cond | None = None
) -> Tensor:
    """Return the estimate ½ |dlogsnr/du| |eps - eps_hat|² of the diffusion term for T = inf, `(B,)`.

    Args:
        denoiser: What is judged.
        x0: Data, `(B, *D)`.
        eps: Standard normal noise like `x0`.
        logsnr: Levels that the schedule gives for u ~ U(0, 1), `(B,)`.
        slope: dlogsnr/du there, or minus one over the density of `logsnr`, `(B,)`.
        cond: Conditions, or None.
    """
    return 0.5 * slope.abs().to(x0.dtype) * eps_error(denoiser, x0, eps, logsnr, cond)


def discrete_diffusion(
    denoiser: DenoiserFn,
    x0: Tensor,
    eps: Tensor,
    logsnr: Tensor,
    logsnr_next: Tensor,
    steps: int,
    cond: Cond | None = None,
) -> Tensor:
    """Return the estimate ½ T expm1(lambda_s - lambda_t) |eps - eps_hat|² of the diffusion term for T steps, `(B,)`.

    Args:
        denoiser: What is judged.
        x0: Data, `(B, *D)`.
        eps: Standard normal noise like `x0`.
        logsnr: lambda_t, the noisier ends of steps that are drawn uniformly, `(B,)`.
        logsnr_next: lambda_s, their cleaner ends, `(B,)`.
        steps: T.
        cond: Conditions, or None.
    """
    factor = 0.5 * steps * torch.expm1(logsnr_next - logsnr)
    return factor.to(x0.dtype) * eps_error(denoiser, x0, eps, logsnr, cond)
