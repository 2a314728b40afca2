r"""Schedules that learn: VDM's monotone network, and a straight line between end points that learn.

Both are a curve m(u) from m(0) = 0 to m(1) = 1 between two trainable end points,

    logsnr(u) = logsnr_max + (logsnr_min - logsnr_max) m(u),

so that the two kinds of parameters stay apart: a variational bound in continuous time depends on the end points alone,
and the curve between them decides only the variance of its estimate (`losses/vlb.py` trains each by what it decides).
The curve of the network is

    g(u) = h + mean_k |w3_k| sigmoid(|w2_k| h + b2_k),    h = |w1| u,    m(u) = (g(u) - g(0)) / (g(1) - g(0)),
    g'(u) = |w1| ( 1 + mean_k |w3_k| |w2_k| sigmoid'(|w2_k| h + b2_k) ).

The paper's biases of the first and of the third layer are not here: the one is a part of b2, the other cancels. The
mean over the hidden units, where the paper has the sum, keeps a step of Adam on w3 as small as one on other weights.

References:
    Kingma, Salimans, Poole & Ho, "Variational Diffusion Models", 2021, appendix H (the monotone network), section 6
    (trainable end points).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusion_lab.process.schedules.base import check_range

# [0, 1] halved so often is below the spacing of float64 near 1
HALVINGS = 56


class LearnedCurve(nn.Module):
    """A schedule between trainable end points: `Schedule`, but for the curve m(u), which subclasses give.

    Inside, everything is float64; parameters are of the default type.

    Args:
        logsnr_min: Initial log-SNR at u = 1.
        logsnr_max: Initial log-SNR at u = 0.

    Attributes:
        logsnr_min: The trained lower end, 0-d.
        logsnr_max: The trained upper end, 0-d.

    Raises:
        ValueError: If the range is empty or infinite.
    """

    def __init__(self, *, logsnr_min: float, logsnr_max: float) -> None:
        super().__init__()
        check_range(logsnr_min, logsnr_max)
        if not math.isfinite(logsnr_max - logsnr_min):
            raise ValueError(f"{type(self).__name__} needs a finite range")
        self.logsnr_min = nn.Parameter(torch.tensor(float(logsnr_min)))
        self.logsnr_max = nn.Parameter(torch.tensor(float(logsnr_max)))

    def curve(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(m(u), m'(u))`, float64, of the shape of `u`; m is exactly 0 at u = 0 and 1 at u = 1."""
        raise NotImplementedError

    def between(self, m: Tensor) -> Tensor:
        """Return the log-SNR at the fraction `m` of the way from `logsnr_max` to `logsnr_min`."""
        # not max + (min - max) m: this one is exact at both ends
        return (1.0 - m) * self.logsnr_max.to(m.dtype) + m * self.logsnr_min.to(m.dtype)

    def forward(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        return self.between(self.curve(u)[0]).to(u.dtype)

    def slope(self, u: Tensor) -> Tensor:
        """Return dlogsnr / du, negative, of the shape and dtype of `u`."""
        fall = self.logsnr_min.double() - self.logsnr_max.double()
        return (fall * self.curve(u)[1]).to(u.dtype)

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`; bisection, float64 inside. Levels beyond the ends give 0 or 1.

        The gradients, with respect to `logsnr` and to the parameters, are those of the implicit function.
        """
        target = logsnr.double()
        with torch.no_grad():
            low, high = torch.zeros_like(target), torch.ones_like(target)
            for _ in range(HALVINGS):
                middle = 0.5 * (low + high)
                cleaner = self(middle) > target
                low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
            u = 0.5 * (low + high)
            u = torch.where(target >= self(torch.zeros_like(u)), 0.0, u)
            u = torch.where(target <= self(torch.ones_like(u)), 1.0, u)
            slope = self.slope(u)
        gap = self(u) - target  # zero up to rounding; what it is for is its gradient
        return (u - (gap - gap.detach()) / slope).to(logsnr.dtype)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`: minus the log of the slope at the inverse. Beyond the ends it is that of the end."""
        return -torch.log(-self.slope(self.inverse(logsnr.double()))).to(logsnr.dtype)


class LearnedLinear(LearnedCurve):
    """m(u) = u: uniform in log-SNR, both end points learn. VDM's released configurations train this one.

    Args:
        logsnr_min: Initial log-SNR at u = 1.
        logsnr_max: Initial log-SNR at u = 0.

    Raises:
        ValueError: If the range is empty or infinite.
    """

    def __init__(self, *, logsnr_min: float = -5.0, logsnr_max: float = 13.3) -> None:
        super().__init__(logsnr_min=logsnr_min, logsnr_max=logsnr_max)

    def curve(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See `LearnedCurve`."""
        u = u.double()
        return u, torch.ones_like(u)


class LearnedSchedule(LearnedCurve):
    """VDM's monotone network. It starts close to the straight line, the same for every seed.

    Args:
        logsnr_min: Initial log-SNR at u = 1.
        logsnr_max: Initial log-SNR at u = 0.
        width: Hidden units; 1024 in the paper.

    Raises:
        ValueError: If the range is empty or infinite, or `width` is not positive.
    """

    def __init__(self, *, logsnr_min: float = -5.0, logsnr_max: float = 13.3, width: int = 1024) -> None:
        super().__init__(logsnr_min=logsnr_min, logsnr_max=logsnr_max)
        if width < 1:
            raise ValueError(f"LearnedSchedule needs width >= 1, got {width}")
        # the hidden units take their steps at places spread over [0, 1], each over about a fifth of it
        steepness = 20.0
        self.w1 = nn.Parameter(torch.ones(()))
        self.w2 = nn.Parameter(torch.full((width,), steepness))
        self.b2 = nn.Parameter(-steepness * (torch.arange(width) + 0.5) / width)
        self.w3 = nn.Parameter(torch.ones(width))

    def curve(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See `LearnedCurve`."""
        u = u.double()
        w1, w2, w3 = (w.double().abs() for w in (self.w1, self.w2, self.w3))
        b2 = self.b2.double()
        ends = torch.arange(2, dtype=u.dtype, device=u.device)

        def g(u: Tensor) -> tuple[Tensor, Tensor]:
            h = w1 * u
            s = torch.sigmoid(w2 * h[..., None] + b2)
            return h + (w3 * s).mean(-1), w1 * (1.0 + (w3 * w2 * s * (1.0 - s)).mean(-1))

        value, slope = g(u)
        start, end = g(ends)[0]
        m = (value - start) / (end - start)
        # rounding may leave m a bit beside 0 and 1; the gradients stay
        m = torch.where(u == 0.0, m - m.detach(), m)
        m = torch.where(u == 1.0, 1.0 + (m - m.detach()), m)
        return m, slope / (end - start)
