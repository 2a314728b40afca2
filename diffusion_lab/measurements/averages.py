"""Measurements that average: over blocks of pixels (super-resolution) and over channels (colourisation)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffusion_lab.measurements.base import image_sides


@dataclass(frozen=True, kw_only=True)
class SuperResolution:
    """Area average: each pixel of y is the mean of a square of `factor` x `factor` pixels.

    Attributes:
        factor: Side of the square, at least 1.

    Raises:
        ValueError: If `factor` is not positive, or (at call) does not divide both sides of the image.
    """

    factor: int = 4

    linear = True

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"SuperResolution needs factor >= 1, got {self.factor}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return `(B, C, H / factor, W / factor)` of images `(B, C, H, W)`."""
        H, W = image_sides(self, x0)
        if H % self.factor or W % self.factor:
            raise ValueError(
                f"SuperResolution: factor {self.factor} does not divide an image of {H} x {W} pixels"
            )
        return avg_pool2d(x0, self.factor)


@dataclass(frozen=True, kw_only=True)
class Colourise:
    """Grey-scale: the mean of the channels.

    Raises:
        ValueError: If (at call) images have a single channel.
    """

    linear = True

    def __call__(self, x0: Tensor) -> Tensor:
        """Return `(B, 1, H, W)` of images `(B, C, H, W)`."""
        image_sides(self, x0)
        if x0.shape[1] < 2:
            raise ValueError(
                "Colourise needs images with several channels; images of one channel are grey already"
            )
        return x0.mean(1, keepdim=True)
