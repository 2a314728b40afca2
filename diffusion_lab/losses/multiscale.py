r"""simple diffusion's multiscale loss: large images, judged at several sizes.

    L_ms = sum over s in {base, 2 base, ..., d} of  1/s · L_s,      L_s = ½ w/p · mean |pool_(d -> s)(eps - eps_hat)|^2

d is the side of the images, pool the average over squares of d/s x d/s pixels, the mean over the pixels that are left.
White errors pool away, (s/d)^2 of their variance is left at side s, while errors of the layout stay: so the small sides
weigh what a large image's many pixels would drown. The mean over pixels is the normaliser that the paper writes as
1/s^2.

Pooling is linear and acts on the error; the exchange rate from the network's own output to eps is one number for an
example, so it is the pooled eps error for every prediction type.

References:
    Hoogeboom, Heek & Salimans, "simple diffusion: End-to-end diffusion for high resolution images", 2023.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.losses.denoising import DenoisingLoss, eps_residual, level_for
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


class MultiscaleLoss(DenoisingLoss):
    """Weighted denoising loss over sides base, 2 base, ... of square images `(B, C, d, d)`; see the module.

    Args:
        schedule: Its density draws the noise levels.
        weighting: The objective, in eps units.
        label_dropout: Probability of hiding an example's label.
        base: Smallest side; the images' own must be it times a power of two.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self, *, schedule: Schedule, weighting: Weighting, label_dropout: float = 0.0, base: int = 32
    ) -> None:
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)
        if base < 1:
            raise ValueError(f"MultiscaleLoss needs base >= 1, got {base}")
        self.base = base

    def example_losses(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        eps: Tensor,
        logsnr: Tensor,
        factor: Tensor,
        cond: Cond | None,
        rng: StepRNG,
    ) -> Tensor:
        """See `DenoisingLoss.example_losses`.

        Raises:
            ValueError: If the images are not square, or their side is not `base` times a power of two.
        """
        side = x0.shape[-1]
        ratio = side // self.base
        if x0.ndim != 4 or x0.shape[-2] != side or ratio * self.base != side or ratio & (ratio - 1):
            raise ValueError(
                f"MultiscaleLoss needs square images of side {self.base} times a power of two, got "
                f"{tuple(x0.shape[1:])}: set method.loss.base"
            )
        x = marginal(denoiser.interpolant, x0, eps, level_for(x0, logsnr))
        error, scale = eps_residual(denoiser, x, x0, eps, logsnr, cond)
        total = error.square().flatten(1).mean(1) / side
        while side > self.base:
            error, side = F.avg_pool2d(error, 2), side // 2
            total = total + error.square().flatten(1).mean(1) / side
        return factor * (scale * total)
