r"""Blur: the correlation of each channel with a kernel whose taps sum to 1, the image reflected at its borders.

    y_ij = sum_uv k_uv x0_(i + u, j + v)

    Gaussian    k_uv ~ exp(-(u^2 + v^2) / (2 std^2)) on a square of `size` taps
    motion      a straight line of `length` pixels at `angle`, its points shared out among the four pixels around them

References:
    Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", 2023, section 4; their motion
    kernels are random curves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from diffusion_lab.measurements.base import image_sides

# points of a motion line per pixel of its length
FINENESS = 16


@dataclass(frozen=True, kw_only=True)
class GaussianBlur:
    """Blur with a Gaussian kernel.

    Attributes:
        size: Taps a side, odd; DPS uses 61 for 256 x 256 pixels.
        std: Standard deviation in pixels; DPS uses 3.

    Raises:
        ValueError: If `size` is not odd and positive or `std` not positive, or (at call) the kernel reaches beyond the
            reflection of the image: each side must be longer than size // 2.
    """

    size: int = 9
    std: float = 1.5

    linear = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % 2 == 0 or not self.std > 0.0:
            raise ValueError(f"GaussianBlur needs an odd size and std > 0, got {self.size} and {self.std}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return blurred images `(B, C, H, W)`."""
        image_sides(self, x0)
        taps = _gaussian(self.size, self.std)
        return _correlate(self, _correlate(self, x0, taps[:, None]), taps[None, :])


@dataclass(frozen=True, kw_only=True)
class MotionBlur:
    """Blur along a straight line.

    Attributes:
        length: Of the line, in pixels, at least 1, which leaves the image as it is.
        angle: In degrees, from the rows' direction towards the top.

    Raises:
        ValueError: If `length` is below 1, or (at call) the kernel reaches beyond the reflection of the image.
    """

    length: float = 9.0
    angle: float = 45.0

    linear = True

    def __post_init__(self) -> None:
        if not self.length >= 1.0:
            raise ValueError(f"MotionBlur needs length >= 1, got {self.length}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return blurred images `(B, C, H, W)`."""
        image_sides(self, x0)
        return _correlate(self, x0, motion_kernel(self.length, self.angle))


@lru_cache(maxsize=32)
def _gaussian(size: int, std: float) -> Tensor:
    # made once and used everywhere: a tensor made in inference mode could not enter a gradient later
    with torch.inference_mode(False):
        u = torch.arange(size, dtype=torch.float64) - size // 2
        taps = torch.exp(-0.5 * (u / std) ** 2)
        return taps / taps.sum()


@lru_cache(maxsize=32)
def motion_kernel(length: float, angle: float) -> Tensor:
    """Return the taps of a motion blur, a square of odd side, float64; kept, so do not write to it.

    Args:
        length: In pixels.
        angle: In degrees.
    """
    with torch.inference_mode(False):
        half = (length - 1.0) / 2.0
        radius = math.ceil(half - 1e-9)
        along = torch.linspace(-half, half, max(1, round(FINENESS * 2 * half)) + 1, dtype=torch.float64)
        # rounding would share a point on a row with its neighbour row
        rows = torch.round(-math.sin(math.radians(angle)) * along, decimals=12) + radius
        columns = torch.round(math.cos(math.radians(angle)) * along, decimals=12) + radius
        grid = torch.arange(2 * radius + 1, dtype=torch.float64)
        # bilinear: a point gives 1 - |distance| to each row and column within one pixel
        by_row = (1.0 - (rows[:, None] - grid).abs()).clamp_min(0.0)
        by_column = (1.0 - (columns[:, None] - grid).abs()).clamp_min(0.0)
        kernel = by_row.T @ by_column
        return kernel / kernel.sum()


def _correlate(operator: object, x0: Tensor, kernel: Tensor) -> Tensor:
    """Correlate each channel of `x0` `(B, C, H, W)` with `kernel` `(h, w)` of odd sides."""
    H, W = image_sides(operator, x0)
    h, w = kernel.shape[0] // 2, kernel.shape[1] // 2
    if h >= H or w >= W:
        raise ValueError(
            f"{type(operator).__name__}: a kernel of {kernel.shape[0]} x {kernel.shape[1]} taps is too large "
            f"for an image of {H} x {W} pixels"
        )
    images = pad(x0, (w, w, h, h), mode="reflect").flatten(0, 1)[:, None]
    return conv2d(images, kernel.to(x0)[None, None]).reshape(x0.shape)
