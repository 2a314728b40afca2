r"""The Gaussian process in one coordinate: marginals, posteriors and DDIM maps as pure functions.

    marginal        x = alpha x0 + sigma eps
    posterior       q(x_next | x, x0) = N( r (alpha_next / alpha) x + (1 - r) alpha_next x0,  (1 - r) sigma_next^2 I )
                    with r = exp(logsnr - logsnr_next) in [0, 1]; logsnr_next >= logsnr is the cleaner level
    DDIM map        x_next = alpha_next x0 + (sigma_next / sigma) (x - alpha x0)
                           = (alpha_next - alpha sigma_next / sigma) x0 + (sigma_next / sigma) x
    add noise       x_hat = (alpha_hat / alpha) x + sigma_hat sqrt(1 - exp(logsnr_hat - logsnr)) z
    inverse         x0 = (x_next - (sigma_next / sigma) x) / (alpha_next - alpha sigma_next / sigma)

The posterior's variance is the smallest that a reverse step may have (x0 known). The largest customary one is that
of the forward kernel from x_next to x, which is exact for white data of unit variance under the
variance-preserving process; in other units it is a different noise, so only samplers that use `var_lower` alone
give the same images in every interpolant:

    var_lower = (1 - r) sigma_next^2,        var_upper = (1 - r) sigma^2.

Every function takes the levels as `x.shape[:k]` tensors (0-d allowed) and is exact at logsnr_next = +inf, where the
DDIM map returns x0 bit for bit, and at logsnr = -inf wherever the interpolant is finite there: r alpha_next / alpha is
evaluated as (sigma_next / sigma)^2 (alpha / alpha_next), which has no 0 / 0.

References:
    Kingma et al., "Variational Diffusion Models", 2021, appendix A (posterior in log-SNR form).
    Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021, eq. 12.
    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, appendix G (inverse DDIM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right, combine
from diffusion_lab.process.interpolants import Interpolant, at_levels


def coefficients(interpolant: Interpolant, logsnr: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(alpha, sigma)` shaped to multiply `x`."""
    alpha, sigma = interpolant(logsnr)
    return broadcast_right(alpha, x), broadcast_right(sigma, x)


def marginal(interpolant: Interpolant, x0: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """Return `x = alpha x0 + sigma eps`."""
    alpha, sigma = coefficients(interpolant, logsnr, x0)
    return alpha * x0 + sigma * eps


def eps_from_x0(interpolant: Interpolant, x: Tensor, x0: Tensor, logsnr: Tensor) -> Tensor:
    """Return `eps = (x - alpha x0) / sigma`.

    Always rebuild eps like this from the x0 in use: after guidance or thresholding the network's own eps no longer
    fits. Undefined (nan or inf) at logsnr = +inf, where there is no noise.
    """
    alpha, sigma = coefficients(interpolant, logsnr, x)
    return (x - alpha * x0) / sigma


def posterior(
    interpolant: Interpolant, x: Tensor, x0: Tensor, logsnr: Tensor, logsnr_next: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, lower and upper variance of the reverse step from `logsnr` to the cleaner `logsnr_next`.

    Args:
        interpolant: The process.
        x: Noisy data at `logsnr`, `(B, *D)`.
        x0: Clean data, or its estimate, `(B, *D)`.
        logsnr: Present level, `x.shape[:k]`.
        logsnr_next: Next level, not below `logsnr`.

    Returns:
        `(mean, var_lower, var_upper)`: `mean` like `x`; the variances shaped to multiply `x`. At `logsnr_next = +inf`
        the mean is `x0` and `var_lower` zero.
    """
    of_x, of_x0, lower, upper = at_levels(_posterior_coefficients, interpolant, logsnr, logsnr_next)
    return combine(of_x0, x0, of_x, x), broadcast_right(lower, x), broadcast_right(upper, x)


def _posterior_coefficients(
    interpolant: Interpolant, logsnr: Tensor, logsnr_next: Tensor
) -> tuple[Tensor, ...]:
    """Return what x and x0 are multiplied with in the mean, and both variances."""
    alpha, sigma = interpolant(logsnr)
    alpha_next, sigma_next = interpolant(logsnr_next)
    ratio = sigma_next / sigma
    # r = exp(logsnr - logsnr_next); equal infinities mean "no step", for which r is 1
    gap = torch.where(logsnr == logsnr_next, torch.zeros_like(logsnr), logsnr - logsnr_next)
    one_minus_r = -torch.expm1(gap)
    lower, upper = one_minus_r * sigma_next**2, one_minus_r * sigma**2
    return ratio**2 * alpha / alpha_next, one_minus_r * alpha_next, lower, upper


def add_noise(interpolant: Interpolant, x: Tensor, z: Tensor, logsnr: Tensor, logsnr_hat: Tensor) -> Tensor:
    """Move `x` from `logsnr` to the noisier (or equal) `logsnr_hat` by fresh noise `z`: the forward process.

    Levels are 0-d or have the leading axes of `x`. Equal levels return `x`, also at -inf.
    """
    kept, added = at_levels(_noising_coefficients, interpolant, logsnr, logsnr_hat)
    return combine(kept, x, added, z)


def _noising_coefficients(interpolant: Interpolant, logsnr: Tensor, logsnr_hat: Tensor) -> tuple[Tensor, ...]:
    (alpha, _), (alpha_hat, sigma_hat) = interpolant(logsnr), interpolant(logsnr_hat)
    # equal levels change nothing; at -inf their difference and the ratio of the alphas are nan
    same = logsnr == logsnr_hat
    kept = torch.where(same, torch.ones_like(alpha), alpha_hat / alpha)
    gap = torch.where(same, torch.zeros_like(logsnr), logsnr_hat - logsnr)
    return kept, sigma_hat * torch.sqrt(-torch.expm1(gap))


def ddim_step(interpolant: Interpolant, x: Tensor, x0: Tensor, logsnr: Tensor, logsnr_next: Tensor) -> Tensor:
    """Return `alpha_next x0 + (sigma_next / sigma) (x - alpha x0)`: x0 and eps kept, the level changed."""
    of_x0, of_x = at_levels(_ddim_coefficients, interpolant, logsnr, logsnr_next)
    return combine(of_x0, x0, of_x, x)


def _ddim_coefficients(interpolant: Interpolant, logsnr: Tensor, logsnr_next: Tensor) -> tuple[Tensor, ...]:
    alpha, sigma = interpolant(logsnr)
    alpha_next, sigma_next = interpolant(logsnr_next)
    ratio = sigma_next / sigma
    return alpha_next - ratio * alpha, ratio


def inverse_ddim_step(
    interpolant: Interpolant, x: Tensor, x_next: Tensor, logsnr: Tensor, logsnr_next: Tensor
) -> Tensor:
    """Return the x0 for which `ddim_step` takes `x` to `x_next`.

    Raises:
        ValueError: If the two levels are equal, where every x0 would do.
    """
    if bool(torch.any(logsnr == logsnr_next)):
        raise ValueError("inverse_ddim_step needs two different noise levels")
    alpha, sigma = interpolant(logsnr)
    alpha_next, sigma_next = interpolant(logsnr_next)
    ratio = sigma_next / sigma
    return (x_next - broadcast_right(ratio, x) * x) / broadcast_right(alpha_next - ratio * alpha, x)
