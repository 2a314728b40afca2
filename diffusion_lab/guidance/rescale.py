r"""Classifier-free guidance whose contrast is brought back to that of the conditional answer.

    x0_cfg  = x0_uncond + scale (x0_cond - x0_uncond)                        (eq. 13)
    x0_resc = x0_cfg std(x0_cond) / std(x0_cfg)                              (eqs. 14, 15)
    x0_hat  = factor x0_resc + (1 - factor) x0_cfg                           (eq. 16)

Guidance stretches x0 away from the unconditional answer, and images come out overexposed; so the paper rescales the
guided output of the network to the contrast it had, and mixes, because alone it makes images too plain.

The standard deviation is that of x0, over all numbers of one sample. The paper takes that of the network's output, v of
the variance-preserving process. A wrapper does not know what the network predicts, and eps and v hold x too. With
v = (alpha x - x0) / sigma, rescaling v by r_v means

    x0_resc = r_v x0_cfg + (1 - r_v) alpha x,

which tends to x0 rescaled at the noise end, where alpha -> 0 and v = -x0 and where guidance overexposes, and pulls
towards the noisy x later. The ratio of x0's standard deviations depends neither on the network nor on the interpolant.

factor = 0 is classifier-free guidance to the bit. A sample of one number, or of one value, has no contrast and is not
rescaled.

References:
    Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are Flawed", 2024, section 3.4, eqs. 13-16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.guidance.branches import answers, unconditional
from diffusion_lab.guidance.classifier_free import ClassifierFree
from diffusion_lab.guidance.interval import EVERYWHERE
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.typing import Cond, DenoiserFn


class Rescale(ClassifierFree):
    """A denoiser guided by its own unconditional answer, at the contrast of its conditional one. Two evaluations.

    Args:
        denoiser: Trained with and without conditions.
        scale: Guidance scale; 1 is off.
        factor: phi in [0, 1], how much of the rescaled answer is mixed in; 0 is classifier-free guidance.
        interval: `(low, high)`: guide where low <= logsnr <= high.
        batched: Whether both answers come from one call, which needs the memory of both.

    Raises:
        ValueError: If `factor` is outside [0, 1], or the interval is not ordered.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        scale: float,
        factor: float = 0.7,
        interval: Sequence[float] = EVERYWHERE,
        batched: bool = True,
    ) -> None:
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"Rescale needs factor in [0, 1], got {factor}")
        super().__init__(denoiser, scale, interval, batched)
        self.factor = factor

    def _guided(self, x: Tensor, logsnr: Tensor, cond: Cond | None) -> Tensor:
        if self.factor == 0.0:
            return super()._guided(x, logsnr, cond)
        without, given = answers(self.denoiser, x, logsnr, [unconditional(cond), cond], batched=self.batched)
        guided = torch.lerp(without, given, self.scale)
        mixed = 1.0 + self.factor * (_contrast(given, guided) - 1.0)
        return broadcast_right(mixed, guided) * guided


def _contrast(given: Tensor, guided: Tensor) -> Tensor:
    """Return std(given) / std(guided) of each sample, `(B,)`; 1 where `guided` is one value up to rounding."""
    std, std_guided = (v.flatten(1).std(dim=1, correction=0) for v in (given, guided))
    rounding = 8 * torch.finfo(guided.dtype).eps * guided.flatten(1).abs().amax(dim=1)
    return torch.where(std_guided > rounding, std / std_guided, 1.0)
