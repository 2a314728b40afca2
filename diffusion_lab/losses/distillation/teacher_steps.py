r"""A teacher's deterministic steps, told by the x0 that one DDIM step would need.

A step from x to x_next at cleaner noise can always be written as one of DDIM, for some x0:

    x_next = alpha_next x0 + (sigma_next / sigma) (x - alpha x0).

Steps are handed on as that x0 and never recovered from x_next: the inverse divides by a coefficient that vanishes for
short steps, where float32 has no digits left. With h half the gap in log-SNR of a step:

    DDIM          x0 is the teacher's answer
    aDDIM         the answer with its noise lengthened, `process/addim.py`
    two steps     w x0_1 + (1 - w) x0_2,              w = e^-h2 (1 - e^-h1) / (1 - e^-(h1 + h2))

The last line is Salimans & Ho's target x~, whose two coefficients are divided out by hand: it is a mean of the two
answers, the same in every interpolant. A second step to logsnr = +inf has w = 0: the target is the second answer.

References:
    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, algorithm 2 and appendix G.
    Heek, Hoogeboom & Salimans, "Multistep Consistency Models", 2024, algorithm 3 (aDDIM).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.process.addim import addim_x0
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn

Variance = Callable[[Tensor], Tensor]
"""The variance of p(x0 | x) in each coordinate, at each log-SNR."""


def decay(logsnr: Tensor, logsnr_next: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(e^-h, 1 - e^-h)` for h half the gap of a step, both exact where h is small or infinite."""
    half = 0.5 * (logsnr_next - logsnr)
    return torch.exp(-half), -torch.expm1(-half)


def joined(first: Tensor, second: Tensor, logsnr: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """Return the x0 of the one step that ends where two steps end.

    Args:
        first: x0 of the step from `logsnr` to `middle`, `(B, *D)`.
        second: x0 of the step from `middle` to `end`, `(B, *D)`.
        logsnr: `(B,)` or 0-d.
        middle: Cleaner than `logsnr`.
        end: Cleaner than `middle`; +inf is clean.
    """
    (_, done), (left, _), (_, whole) = decay(logsnr, middle), decay(middle, end), decay(logsnr, end)
    return second + broadcast_right(left * done / whole, first) * (first - second)


def adjusted(
    interpolant: Interpolant, x: Tensor, x0: Tensor, logsnr: Tensor, logsnr_next: Tensor, x_var: Variance
) -> Tensor:
    """Return the x0 with which DDIM's step is aDDIM's; at logsnr_next = +inf `x0` itself.

    Args:
        interpolant: The process.
        x: Noisy data `(B, *D)`.
        x0: The teacher's answer.
        logsnr: `(B,)`.
        logsnr_next: `(B,)`.
        x_var: See `Variance`.
    """
    found = addim_x0(interpolant, x, x0, logsnr, logsnr_next, x_var(logsnr))
    return torch.where(broadcast_right(torch.isposinf(logsnr_next), x).bool(), x0, found)


def one_step(
    teacher: DenoiserFn,
    x: Tensor,
    logsnr: Tensor,
    logsnr_next: Tensor,
    cond: Cond | None = None,
    x_var: Variance | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(x0, x_next)` of one step of a teacher.

    Args:
        teacher: Asked once, at `logsnr`.
        x: Noisy data `(B, *D)`.
        logsnr: `(B,)`, float64 where digits matter.
        logsnr_next: `(B,)`, cleaner.
        cond: Conditions.
        x_var: None steps by DDIM, else by aDDIM.
    """
    x0 = teacher(x, logsnr, cond)
    if x_var is not None:
        x0 = adjusted(teacher.interpolant, x, x0, logsnr, logsnr_next, x_var)
    return x0, ddim_step(teacher.interpolant, x, x0, logsnr, logsnr_next)
