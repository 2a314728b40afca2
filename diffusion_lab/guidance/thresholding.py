r"""Thresholding: keep the estimate of x0 inside the range of images.

    static     x0 -> clip(x0, -limit, limit)
    dynamic    s = max(limit, q-quantile of |x0| over the pixels of one image),    x0 -> limit clip(x0, -s, s) / s

Large guidance scales push x0 outside the range of the data; clipping flattens it into saturated pixels, dynamic
thresholding pulls the whole image back instead. Samplers rebuild eps from the x0 they are given, so neither leaves a
stale eps behind. q = 1 with an estimate already inside the range changes nothing.

References:
    Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", 2022, section 2.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, conditional_of


def _check_limit(limit: float) -> None:
    if not limit > 0.0:
        raise ValueError(f"a threshold needs limit > 0, got {limit}")


class StaticThreshold:
    """A denoiser whose answer is clipped.

    Args:
        denoiser: The denoiser.
        limit: Largest absolute value of a pixel.

    Raises:
        ValueError: If `limit` is not positive.
    """

    def __init__(self, denoiser: DenoiserFn, limit: float = 1.0) -> None:
        _check_limit(limit)
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.limit = denoiser, limit

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return x0_hat in [-limit, limit], of the shape of `x`."""
        return self.denoiser(x, logsnr, cond).clamp(-self.limit, self.limit)


class DynamicThreshold:
    """A denoiser whose answer is clipped at a quantile of each sample, and scaled back.

    Args:
        denoiser: The denoiser.
        quantile: q in (0, 1]; Imagen uses 0.995.
        limit: Range of the data; samples inside it are left alone.

    Raises:
        ValueError: If `quantile` is outside (0, 1] or `limit` is not positive.
    """

    def __init__(self, denoiser: DenoiserFn, quantile: float = 0.995, limit: float = 1.0) -> None:
        _check_limit(limit)
        if not 0.0 < quantile <= 1.0:
            raise ValueError(f"DynamicThreshold needs quantile in (0, 1], got {quantile}")
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.quantile, self.limit = denoiser, quantile, limit

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return x0_hat in [-limit, limit], of the shape of `x`.

        Raises:
            RuntimeError: If one sample has more than 2^24 numbers.
        """
        x0 = self.denoiser(x, logsnr, cond)
        # a sample at a time, since torch.quantile takes no more than 2^24 numbers, which a batch may exceed
        rows = x0.flatten(1).abs().to(torch.float32).unbind(0)
        s = torch.stack([torch.quantile(row, self.quantile) for row in rows])
        s = broadcast_right(s.clamp_min(self.limit).to(x0.dtype), x0)
        return x0.clamp(-s, s) * (self.limit / s)
