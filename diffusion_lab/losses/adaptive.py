r"""Losses that learn from the statistics of past batches, and the first of them: VDM++'s adaptive schedule.

A batch is spread over micro-batches and processes, and what a loss learns must not depend on how. So learning has two
parts (`Adaptive`): statistics that add up over examples, and a step taken with their sum after the optimizer's.

With the adaptive schedule the statistics are, for each bin of log-SNR,

    ( sum of w |eps - eps_hat|²,  number of examples ),      w |eps - eps_hat|² = 2 p loss_i,

the loss with its factor 1 / p undone: with it, the schedule would chase itself.

References:
    Kingma & Gao, "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation", 2023 (adaptive noise
    schedule).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion_lab.losses.denoising import DenoisingLoss, LossTerms
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.schedules.adaptive import AdaptiveSchedule


@runtime_checkable
class Adaptive(Protocol):
    """A loss that learns from statistics of the batches. What it learns belongs in buffers, which checkpoints hold."""

    def statistics(self, terms: LossTerms) -> Tensor:
        """Return what is to be learnt of a micro-batch: of a fixed shape, and additive over examples."""
        ...

    def adapt(self, statistics: Tensor) -> None:
        """Learn from the statistics of a whole optimizer step, summed over its micro-batches and processes."""
        ...


class AdaptiveDenoisingLoss(DenoisingLoss):
    """The denoising loss with noise levels drawn where it is large; its expectation is that of any other schedule.

    Args:
        schedule: The schedule that adapts.
        weighting: The objective, in eps units; not one that is stated by means of a schedule's density, which would
            change while the schedule adapts.
        label_dropout: Probability of hiding an example's label.

    Raises:
        ValueError: If `label_dropout` is outside [0, 1], or the weighting contains an adaptive schedule.
        TypeError: If the schedule does not adapt.
    """

    schedule: AdaptiveSchedule
    adapts = True

    def __init__(
        self, *, schedule: AdaptiveSchedule, weighting: Weighting, label_dropout: float = 0.0
    ) -> None:
        if not isinstance(schedule, AdaptiveSchedule):
            raise TypeError(f"AdaptiveDenoisingLoss needs an AdaptiveSchedule, not {type(schedule).__name__}")
        if isinstance(getattr(weighting, "schedule", None), AdaptiveSchedule):
            raise ValueError(
                f"{type(weighting).__name__} weighs by the density of the schedule that it was trained with: with an "
                "adaptive one there is no such objective. Take a weighting of log-SNR alone (sigmoid, elbo, edm)"
            )
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)

    @torch.no_grad()
    def statistics(self, terms: LossTerms) -> Tensor:
        """Return `(2, bins)` float64: sums of w |eps - eps_hat|², and counts. See `Adaptive`.

        To be called before the `adapt` of the step that `terms` are of: it needs the density they were drawn with.
        """
        logsnr = terms.logsnr.double()
        error = 2.0 * terms.per_example.double() * torch.exp(self.schedule.log_density(logsnr))
        values = torch.stack([error, torch.ones_like(error)])
        return values.new_zeros(2, self.schedule.bins).index_add_(1, self.schedule.bin_of(logsnr), values)

    def adapt(self, statistics: Tensor) -> None:
        """See `Adaptive`."""
        sums, counts = statistics
        self.schedule.update(sums, counts)
