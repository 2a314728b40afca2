"""Guidance that has been distilled: the scale is told to the network, which answers in one call.

The scale means what it means in `classifier_free.py`: 1 is the conditional model, 1 + w of Meng et al. A model that was
never taught to be told is refused, and so is a scale outside the range that it was taught.

References:
    Meng et al., "On Distillation of Guided Diffusion Models", 2023, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.denoisers.guided import GUIDANCE_SCALE, GuidedDenoiser
from diffusion_lab.denoisers.network import NetworkDenoiser
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn


class Distilled:
    """A denoiser that is told its guidance scale. One evaluation.

    Args:
        denoiser: A student of guided models, or a stand-in for one.
        scale: Guidance scale; 1 is the conditional model.

    Raises:
        ValueError: If the denoiser is a network that is told no scale, or `scale` is outside what it was trained for.
    """

    def __init__(self, denoiser: DenoiserFn, scale: float) -> None:
        if isinstance(denoiser, GuidedDenoiser):
            low, high = denoiser.scales
            if not low <= scale <= high:
                raise ValueError(
                    f"guidance.scale={scale}: this student was trained for scales {low} to {high}"
                )
        elif isinstance(denoiser, NetworkDenoiser):
            raise ValueError(
                "this model is told no guidance scale: guidance=cfg, or distil it by method=guided"
            )
        self.interpolant: Interpolant = denoiser.interpolant
        self.denoiser, self.scale = denoiser, scale

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the guided x0_hat, of the shape of `x`."""
        scale = torch.full((len(x),), self.scale, dtype=x.dtype, device=x.device)
        return self.denoiser(x, logsnr, {**(cond or {}), GUIDANCE_SCALE: scale})
