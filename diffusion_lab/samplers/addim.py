r"""aDDIM: DDIM whose noise is lengthened by the variance that the mean of x0 lacks.

    x_next = alpha_next x0 + sqrt( sigma_next^2 + (d / |eps|^2) c^2 x_var ) eps,

c being the slope of DDIM's map to x_next and d / |eps|^2 that of each sample (`process/addim.py`). x_var comes from a
table, `measured_x_var` of the model, or is

    x_var = fraction / (1 / prior_variance + alpha^2 / sigma^2),

a fraction of the posterior variance under Gaussian data; 0.1 and 0.5 are the paper's 0.1 / (2 + SNR). The fraction is
below 1 because x0 and eps are correlated: all of the variance would make x too long. With x_var = 0 it is DDIM.

References:
    Heek, Hoogeboom & Salimans, "Multistep Consistency Models", 2024, algorithm 3 and section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.process.addim import addim_x0
from diffusion_lab.process.broadcast import expand_logsnr, is_infinite
from diffusion_lab.process.gaussian import ddim_step, marginal
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import Cond, DenoiserFn


@dataclass(frozen=True, kw_only=True)
class ADDIM(Stepper):
    """Adjusted DDIM. One call of the denoiser a step; deterministic; order 1.

    Args:
        fraction: Share of the posterior variance, where there is no table; 0 is DDIM, to the bit.
        prior_variance: Variance of the data, where there is no table.
        table: Rows `(logsnr, x_var)`, logsnr increasing, instead of both; linear between rows, constant outside.
        adjust_last: Whether the last step, too, adds its lengthened noise, as the paper's algorithm does. Without it
            the last step returns the denoiser's output.

    Raises:
        ValueError: If a number is negative, `prior_variance` is not positive, or the table is malformed.
    """

    fraction: float = 0.1
    prior_variance: float = 0.5
    table: Sequence[Sequence[float]] | None = None
    adjust_last: bool = False

    def __post_init__(self) -> None:
        if not (self.fraction >= 0.0 and self.prior_variance > 0.0):
            raise ValueError(f"ADDIM needs fraction >= 0 and prior_variance > 0, got {self}")
        if self.table is not None:
            rows = np.asarray(self.table, dtype=np.float64)
            fits = rows.ndim == 2 and rows.shape[1] == 2 and bool(np.isfinite(rows).all())
            if not fits or (np.diff(rows[:, 0]) <= 0).any() or (rows[:, 1] < 0).any():
                raise ValueError(
                    "ADDIM's table needs finite rows (logsnr, x_var), logsnr increasing, x_var not negative"
                )

    def x_var(self, logsnr: Tensor) -> Tensor:
        """Return x_var at each level, in units of x0^2."""
        if self.table is None:
            return self.fraction / (1.0 / self.prior_variance + torch.exp(logsnr))
        rows = np.asarray(self.table, dtype=np.float64)
        found = np.interp(logsnr.cpu().numpy(), rows[:, 0], rows[:, 1])
        return torch.from_numpy(np.asarray(found)).to(logsnr.device)

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`."""
        x0 = denoiser(x, logsnr)
        if self.adjust_last or not is_infinite(logsnr_next, 1):
            x0 = addim_x0(denoiser.interpolant, x, x0, logsnr, logsnr_next, self.x_var(logsnr))
        return ddim_step(denoiser.interpolant, x, x0, logsnr, logsnr_next), None


def measured_x_var(
    denoiser: DenoiserFn,
    x0: Tensor,
    logsnr: Tensor,
    *,
    fraction: float = 0.75,
    cond: Cond | None = None,
    rng: SampleRNG,
) -> list[tuple[float, float]]:
    """Return a table for `ADDIM`: `fraction` times the mean square error of the denoiser, each coordinate's.

    Args:
        denoiser: E[x0 | x], conditional but not guided.
        x0: Clean data `(n, *D)`.
        logsnr: Levels `(m,)`, increasing, below +inf.
        fraction: Heek et al. take 0.75.
        cond: Conditions of the data.
        rng: One stream a row of `x0`.
    """
    table = []
    for level in logsnr:
        x = marginal(denoiser.interpolant, x0, rng.randn_like(x0), level)
        with torch.no_grad():
            error = denoiser(x, expand_logsnr(level, x), cond) - x0
        table.append((float(level), fraction * float(error.double().square().mean())))
    return table
