r"""A schedule whose density follows the loss: VDM++'s adaptive importance sampling of noise levels.

[logsnr_min, logsnr_max] is cut into B bins of equal width D. Each keeps a running mean m_b of w |eps - eps_hat|², w the
weighting of the loss, over the examples drawn in it, and the density is piecewise constant,

    p(logsnr) = p_b / D,      p_b = (m_b + f mean_c m_c) / sum_a (m_a + f mean_c m_c),

with a floor f, so that no bin is ever forgotten. u = 1 - P(logsnr), P the distribution function: straight lines between
the edges of the bins, inverted without error. An example's loss, w |eps - eps_hat|² / p, is then about as large in one
bin as in another, and its variance is small.

A batch of n examples moves a bin that was drawn from by

    m_b <- d m_b + (1 - d) mean of the bin,      d = 2^(-n / halflife_images),

and leaves the others. The clock is images, so a run with another batch size adapts as fast.

References:
    Kingma & Gao, "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation", 2023, section on the
    adaptive noise schedule; the number of bins, the floor and the half-life are not stated there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusion_lab.process.schedules.base import check_range


class AdaptiveSchedule(nn.Module):
    """A `Schedule` of piecewise constant density, uniform until `update` is called.

    Args:
        logsnr_min: Log-SNR at u = 1.
        logsnr_max: Log-SNR at u = 0.
        bins: B.
        halflife_images: Examples after which a running mean has forgotten half of what it was.
        floor: f, the share of the average bin that every bin has at least.

    Attributes:
        means: m, `(B,)` float64, from the lowest log-SNR up; a buffer.

    Raises:
        ValueError: If the range is empty or infinite, there are no bins, or `halflife_images` or `floor` is not
            positive.
    """

    means: Tensor

    def __init__(
        self,
        *,
        logsnr_min: float = -10.0,
        logsnr_max: float = 10.0,
        bins: int = 100,
        halflife_images: float = 500_000,
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        check_range(logsnr_min, logsnr_max)
        if not math.isfinite(logsnr_max - logsnr_min):
            raise ValueError("AdaptiveSchedule needs a finite range")
        if bins < 1 or halflife_images <= 0 or floor <= 0.0:
            raise ValueError(
                "AdaptiveSchedule needs bins >= 1, halflife_images > 0 and floor > 0, got "
                f"{bins}, {halflife_images} and {floor}"
            )
        self.logsnr_min, self.logsnr_max, self.bins = logsnr_min, logsnr_max, bins
        self.halflife_images, self.floor = halflife_images, floor
        self.register_buffer("means", torch.ones(bins, dtype=torch.float64))

    def probabilities(self) -> Tensor:
        """Return p_b, `(B,)` float64, summing to 1."""
        raised = self.means + self.floor * self.means.mean()
        return raised / raised.sum()

    def bin_of(self, logsnr: Tensor) -> Tensor:
        """Return the bin of each log-SNR, int64; levels beyond the ends belong to the outermost bins."""
        place = (logsnr.double() - self.logsnr_min) * (self.bins / (self.logsnr_max - self.logsnr_min))
        return place.clamp(0, self.bins - 1).long()

    def _corners(self) -> tuple[Tensor, Tensor]:
        """Edges of the bins and the distribution function there, each `(B + 1,)`."""
        edges = torch.linspace(
            self.logsnr_min, self.logsnr_max, self.bins + 1, dtype=torch.float64, device=self.means.device
        )
        below = self.probabilities().cumsum(0)
        return edges, torch.cat([below.new_zeros(1), below[:-1], below.new_ones(1)])

    def forward(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        edges, below = self._corners()
        P = 1.0 - u.double()
        b = (torch.searchsorted(below, P.contiguous(), right=True) - 1).clamp(0, self.bins - 1)
        inside = (P - below[b]) / (below[b + 1] - below[b])
        return torch.lerp(edges[b], edges[b + 1], inside).to(u.dtype)

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`. Levels beyond the ends continue the outermost bins."""
        edges, below = self._corners()
        b = self.bin_of(logsnr)
        inside = (logsnr.double() - edges[b]) / (edges[b + 1] - edges[b])
        return (1.0 - torch.lerp(below[b], below[b + 1], inside)).to(logsnr.dtype)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        density = self.probabilities() * (self.bins / (self.logsnr_max - self.logsnr_min))
        return torch.log(density)[self.bin_of(logsnr)].to(logsnr.dtype)

    @torch.no_grad()
    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Move the running means by one batch.

        Args:
            sums: Sum of w |eps - eps_hat|² over the examples of each bin, `(B,)`, over all processes.
            counts: Number of these examples, `(B,)`.
        """
        sums, counts = sums.to(self.means), counts.to(self.means)
        keep = torch.exp2(-counts.sum() / self.halflife_images)
        moved = keep * self.means + (1.0 - keep) * sums / counts.clamp(min=1.0)
        self.means.copy_(torch.where(counts > 0, moved, self.means))
