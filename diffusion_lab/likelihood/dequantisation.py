r"""Dequantisation: noise u inside the bin of a level, and the log of the law it was drawn from.

    -log P(x) <= E_q [ log q(u | x) - log p(x + u) ]          (`bits.py`)

The bound is tight where q(u | x) is the model's own law of u in the bin, p(x + u) / P(x).

    uniform             q = w^-D
    truncated normal    u = s eps, eps standard normal cut to |eps| <= tau = w / (2 s), s = exp(-logsnr_max / 2)
                        log q = sum [ -½ eps² - ½ log 2 pi - log s - log erf(tau / sqrt 2) ]
    variational         q learned, `variational.py`

A diffusion model of images knows the levels: near them its density at logsnr_max is the noise of that level, N(0, s²),
and almost nothing in between. Uniform noise is judged by such a model as what it never saw; truncated-normal noise
is the state that it was trained on, cut where the next bin begins.

References:
    Zheng, Lu, Chen & Zhu, "Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs", 2023, section 4
        (truncated normal).
    Uria, Murray & Larochelle, "RNADE", 2013 (uniform).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion_lab.rng import SampleRNG


@runtime_checkable
class Dequantisation(Protocol):
    """A law of noise inside bins."""

    def __call__(self, x0: Tensor, rng: SampleRNG) -> tuple[Tensor, Tensor]:
        """Return `(u, log_q)`: noise like `x0` `(B, *D)`, and the log of its density in nats, `(B,)` float64.

        Args:
            x0: Data on the levels.
            rng: A stream for each sample.
        """
        ...


def _check_gap(gap: float) -> None:
    if not 0.0 < gap < math.inf:
        raise ValueError(f"dequantisation needs a distance of levels > 0, got {gap}")


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """u uniform on the bin.

    Args:
        gap: w, the distance of neighbouring levels.

    Raises:
        ValueError: If `gap` is not positive.
    """

    gap: float

    def __post_init__(self) -> None:
        _check_gap(self.gap)

    def __call__(self, x0: Tensor, rng: SampleRNG) -> tuple[Tensor, Tensor]:
        """See `Dequantisation`."""
        u = self.gap * (rng.rand(x0.shape[1:], dtype=torch.float64, device=x0.device) - 0.5)
        log_q = torch.full((len(x0),), -x0[0].numel() * math.log(self.gap), dtype=torch.float64)
        return u.to(x0.dtype), log_q.to(x0.device)


@dataclass(frozen=True, kw_only=True)
class TruncatedNormal:
    """The noise of log-SNR `logsnr`, in the unit of the data, cut to the bin.

    Args:
        gap: w, the distance of neighbouring levels.
        logsnr: The level at which the density begins, its logsnr_max.

    Raises:
        ValueError: If `gap` is not positive, or `logsnr` not finite.
    """

    gap: float
    logsnr: float

    def __post_init__(self) -> None:
        _check_gap(self.gap)
        if not math.isfinite(self.logsnr):
            raise ValueError("a truncated normal needs a finite log-SNR")

    def __call__(self, x0: Tensor, rng: SampleRNG) -> tuple[Tensor, Tensor]:
        """See `Dequantisation`."""
        s = math.exp(-0.5 * self.logsnr)
        mass = math.erf(0.5 * self.gap / s / math.sqrt(2.0))
        uniform = rng.rand(x0.shape[1:], dtype=torch.float64, device=x0.device)
        # rounding must not lead out of the bin
        tau = 0.5 * self.gap / s
        eps = (math.sqrt(2.0) * torch.erfinv(mass * (2.0 * uniform - 1.0))).clamp(-tau, tau)
        log_q = -0.5 * eps.square() - (0.5 * math.log(2.0 * math.pi) + math.log(s) + math.log(mass))
        return (s * eps).to(x0.dtype), log_q.flatten(1).sum(1)
