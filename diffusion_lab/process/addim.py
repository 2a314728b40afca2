r"""aDDIM's step as one of DDIM: the noise is lengthened by the variance that the mean of x0 lacks.

DDIM's map to x_next is linear in x0 with slope c, so a draw of x0 in place of its mean would add c^2 x_var to each
coordinate's variance, x_var being that of p(x0 | x). aDDIM draws nothing: it lengthens the noise it has, of d numbers,

    x_next = alpha_next x0 + sqrt( sigma_next^2 + (d / |eps|^2) c^2 x_var ) eps,    eps = (x - alpha x0) / sigma,
    c = alpha_next - alpha sigma_next / sigma = alpha_next (1 - exp(-h)),           h half the gap in log-SNR.

With n = x - alpha x0, m its mean square and r = sigma_next / sigma that is DDIM's step by another x0,

    x0 + c x_var / (m (s + r)) n,        s = sqrt(r^2 + c^2 x_var / m),

which is written so that nothing cancels where a step is short: (s - r) / c does.

References:
    Heek, Hoogeboom & Salimans, "Multistep Consistency Models", 2024, algorithm 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant


def addim_x0(
    interpolant: Interpolant, x: Tensor, x0: Tensor, logsnr: Tensor, logsnr_next: Tensor, x_var: Tensor
) -> Tensor:
    """Return the x0 with which DDIM's step is aDDIM's; `x0` itself where `x_var` is zero.

    Args:
        interpolant: The process.
        x: Noisy data `(B, *D)`. One whose noise is exactly zero has nothing to lengthen.
        x0: The mean of p(x0 | x).
        logsnr: `(B,)` or 0-d.
        logsnr_next: Cleaner; at +inf the last step, too, adds its lengthened noise.
        x_var: The variance of p(x0 | x) in each coordinate, like `logsnr`.
    """
    (alpha, sigma), (alpha_next, sigma_next) = interpolant(logsnr), interpolant(logsnr_next)
    noise = x - broadcast_right(alpha, x) * x0
    square = (noise.flatten(1) ** 2).mean(1)
    ratio = sigma_next / sigma
    c = -alpha_next * torch.expm1(0.5 * (logsnr - logsnr_next))
    missing = c * x_var / torch.where(square > 0, square, torch.inf)
    gain = missing / (torch.sqrt(ratio**2 + c * missing) + ratio)
    # a last step without anything missing is 0 / 0
    gain = torch.where(missing == 0, torch.zeros_like(gain), gain)
    return x0 + broadcast_right(gain, x) * noise
