r"""Input perturbation: in training the network sees a little more noise than it is told and judged by.

    x = alpha x0 + sigma (eps + gamma xi),      xi ~ N(0, I),      target eps

A sampler feeds a network its own errors, which training never shows it; the noise gamma xi stands for them. Only the
network's input changes: its target is that of (x0, eps), for any prediction type, so the best answer is
E[target | x] with noise of variance 1 + gamma^2 in x. For `Eps` that is the paper's loss. gamma = 0 is `DenoisingLoss`.

What is learned is the answer to perturbed inputs: on Gaussian data of variance c the best eps_hat is

    sigma x / (alpha^2 c + (1 + gamma^2) sigma^2).

References:
    Ning, Sangineto, Porrello, Calderara & Cucchiara, "Input Perturbation Reduces Exposure Bias in Diffusion Models",
    2023.
"""

from __future__ import annotations

from torch import Tensor

from diffusion_lab.losses.denoising import DenoisingLoss, eps_residual, level_for
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


class InputPerturbationLoss(DenoisingLoss):
    """Weighted denoising loss with perturbed inputs; see the module.

    Args:
        schedule: Its density draws the noise levels.
        weighting: The objective, in eps units.
        label_dropout: Probability of hiding an example's label.
        gamma: Standard deviation of the perturbation in units of the noise; 0.1 in the paper.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self, *, schedule: Schedule, weighting: Weighting, label_dropout: float = 0.0, gamma: float = 0.1
    ) -> None:
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)
        if gamma < 0.0:
            raise ValueError(f"InputPerturbationLoss needs gamma >= 0, got {gamma}")
        self.gamma = gamma

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
        """See `DenoisingLoss.example_losses`."""
        xi = rng.randn("input_perturbation", x0.shape[1:], dtype=x0.dtype)
        x = marginal(denoiser.interpolant, x0, eps + self.gamma * xi, level_for(x0, logsnr))
        error, scale = eps_residual(denoiser, x, x0, eps, logsnr, cond)
        return factor * (scale * error.square().flatten(1).mean(1))
