r"""Loss-aware sampling: noise levels are drawn where the loss has the largest second moment.

    p_k = (1 - share) m_k / sum_j m_j + share / K,      m_k = sqrt(mean of the last H values of E_k[L^2])

over K equal bins of the schedule's u, one a step for a discrete bound of K steps. An example drawn from bin k is
weighted by 1 / (K p_k), so the expected loss is that of uniform draws, whatever p is; with share = 0 and exact m, p is
the law that makes the variance of that estimate smallest. Until every bin has H values, p is uniform.

Where the published code keeps the last 10 losses a step, the history here keeps the mean squared loss of each bin over
an optimizer step's whole batch, 10 of them: sums and counts can be added over micro-batches and processes, and a run
does not depend on how it is spread. With one example a bin and step both are the same.

References:
    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, section 3.3, eq. 18; for the uniform
    share 0.001, the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.losses.adaptive import Adaptive
from diffusion_lab.losses.denoising import DenoisingLoss, LossTerms
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn

# so that rounding takes no draw across the edge of its bin; it moves no estimate
MARGIN = 1e-9


@dataclass(frozen=True, kw_only=True)
class LossAwareTerms(LossTerms):
    """Losses with importance weights, and what they are made of.

    Attributes:
        unweighted: Losses before the importance weights, `(B,)`, detached.
        bins: Bin each example was drawn from, `(B,)` int64.
    """

    unweighted: Tensor
    bins: Tensor


class LossAware(nn.Module):
    """Draws the noise levels of `loss` in proportion to the root mean square of its recent values; see the module.

    Args:
        loss: A loss whose `total` is the mean of its `per_example`.
        bins: K; the loss's own number of steps, if it has one.
        history: H, values kept for each bin.
        uniform_share: Probability that is spread evenly, in (0, 1].

    Raises:
        ValueError: If an argument is out of its range, or `loss` adapts itself.
    """

    history: Tensor
    count: Tensor

    def __init__(
        self, *, loss: DenoisingLoss, bins: int, history: int = 10, uniform_share: float = 0.001
    ) -> None:
        super().__init__()
        if bins < 1 or history < 1 or not 0.0 < uniform_share <= 1.0:
            raise ValueError(
                "LossAware needs bins >= 1, history >= 1 and 0 < uniform_share <= 1, got "
                f"{bins}, {history} and {uniform_share}"
            )
        if isinstance(loss, Adaptive):
            raise ValueError(f"LossAware would keep {type(loss).__name__} from adapting")
        self.loss, self.bins, self.uniform_share = loss, bins, uniform_share
        self.register_buffer("history", torch.zeros(bins, history, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(bins, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Return p, `(K,)` float64, summing to 1."""
        moment = self.history.mean(1).sqrt()
        total = moment.sum()
        full = (self.count >= self.history.shape[1]).all() & (total > 0.0)
        even = torch.full_like(moment, 1.0 / self.bins)
        # asked without looking, which on a GPU would make every step wait
        aware = (1.0 - self.uniform_share) * moment / torch.where(
            full, total, 1.0
        ) + self.uniform_share * even
        return torch.where(full, aware, even)

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn uniform draws `u` `(B,)` in [0, 1) into `(u', bins, weights)`: u' has the density K p_k in bin k.

        Evenly spread `u` gives evenly spread u' within its density, so stratified draws stay stratified.
        """
        p = self.probabilities()
        ends = p.cumsum(0)
        bins = torch.searchsorted(ends, u.contiguous(), right=True).clamp(max=self.bins - 1)
        inside = ((u - (ends - p)[bins]) / p[bins]).clamp(MARGIN, 1.0 - MARGIN)
        return (bins + inside) / self.bins, bins, 1.0 / (self.bins * p[bins])

    def forward(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        logsnr: Tensor | None = None,
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`, with importance weights.

        Args:
            denoiser: What is judged.
            x0: Clean data, images in [-1, 1].
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
            logsnr: `(B,)` levels to use instead of drawing them; nothing is reweighted then.
        """
        if logsnr is not None:
            given: LossTerms = self.loss(denoiser, x0, cond, rng, logsnr=logsnr)
            return given
        u, bins, weights = self.draw(rng.stratified("noise_level"))
        level, _ = self.loss.noise_levels.at(u)
        terms: LossTerms = self.loss(denoiser, x0, cond, rng, logsnr=level)
        per_example = weights.to(terms.per_example.dtype) * terms.per_example
        return LossAwareTerms(
            total=per_example.mean(),
            per_example=per_example,
            logsnr=terms.logsnr,
            unweighted=terms.per_example.detach(),
            bins=bins,
        )

    def statistics(self, terms: LossTerms) -> Tensor:
        """Return `(K, 2)` float64: the sum of the squared losses drawn from each bin, and their number.

        Raises:
            ValueError: If `terms` are not what this loss drew.
        """
        if not isinstance(terms, LossAwareTerms):
            raise ValueError("LossAware learns from the terms it drew itself")
        square = terms.unweighted.double().square()
        values = torch.stack([square, torch.ones_like(square)], dim=1)
        return torch.zeros(self.bins, 2, dtype=torch.float64, device=values.device).index_add_(
            0, terms.bins, values
        )

    @torch.no_grad()
    def adapt(self, statistics: Tensor) -> None:
        """Put the mean squared loss of each bin that was drawn from in the place of its oldest value.

        Args:
            statistics: `(K, 2)`, summed over micro-batches and processes.
        """
        total, number = statistics.unbind(1)
        drawn = number > 0
        place = F.one_hot(self.count % self.history.shape[1], self.history.shape[1]).bool()
        value = (total / number.clamp(min=1.0))[:, None]
        self.history.copy_(torch.where(place & drawn[:, None], value, self.history))
        self.count.add_(drawn)
