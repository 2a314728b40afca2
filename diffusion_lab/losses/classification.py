r"""The loss of a classifier of noisy data, at all noise levels at once.

    logsnr ~ p (the schedule's density),    x = alpha x0 + sigma eps,    loss_i = -log p(label_i | x_i, logsnr_i)

Its minimum is the posterior of the label, whose gradient is the difference of two scores:
grad_x log p(label | x) = grad_x log q(x | label) - grad_x log q(x).

References:
    Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lab.denoisers.classifier import NetworkClassifier
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.noise_levels import NoiseLevels
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond


class ClassificationLoss(nn.Module):
    """Cross-entropy of a batch of noisy examples.

    Args:
        schedule: Its density draws the noise levels.
    """

    def __init__(self, *, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.noise_levels = NoiseLevels(schedule=schedule)

    def forward(
        self,
        classifier: NetworkClassifier,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        logsnr: Tensor | None = None,
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`, in nats.

        Args:
            classifier: What is judged.
            x0: Clean data, images in [-1, 1].
            cond: `{"label": (B,)}`.
            rng: Random numbers of this step for these rows.
            logsnr: `(B,)` levels to use instead of drawing them.

        Raises:
            ValueError: If there are no labels, or (on the CPU) an example has none.
        """
        if cond is None or "label" not in cond:
            raise ValueError("a classifier learns from labels, and this data set has none")
        if logsnr is None:
            logsnr, _ = self.noise_levels(rng)
        logsnr = logsnr.to(x0.dtype) if x0.dtype == torch.float64 else logsnr.float()
        eps = rng.randn("noise", x0.shape[1:], dtype=x0.dtype)
        x = marginal(classifier.interpolant, x0, eps, logsnr)
        labels = cond["label"]
        # on a GPU the question would make every step wait; the loss's own check answers there
        if labels.device.type == "cpu" and bool((labels < 0).any()):
            raise ValueError("a classifier learns from labels, and some examples have none")
        per_example = F.cross_entropy(classifier(x, logsnr), cond["label"], reduction="none")
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=logsnr)
