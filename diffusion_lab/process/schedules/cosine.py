r"""The cosine family of schedules: clipped, shifted for image size, interpolated between two shifts.

    cosine          logsnr(u) = -2 log tan(theta0 + u (theta1 - theta0)),
                    theta0 = atan(exp(-logsnr_max / 2)),  theta1 = atan(exp(-logsnr_min / 2))
    shifted         logsnr(u) + shift,   shift = 2 log(reference / size)
    interpolated    u shifted_high(u) + (1 - u) shifted_low(u)

With an infinite range the first is alpha = cos(pi u / 2), sigma = sin(pi u / 2). Averaging s x s blocks of an image
keeps the signal and divides the noise variance by s^2, so an image of side `size` needs 2 log(size / reference) less
log-SNR to look as noisy as one of side `reference`: hence the shift, in logs of sides, not of pixel counts. The
interpolated schedule starts (u = 0) with the strong shift of the small reference, for detail, and ends with the weak
shift of the large one.

References:
    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021 (cosine).
    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022 (clipped log-SNR form).
    Hoogeboom, Heek & Salimans, "simple diffusion", 2023, section 3.1 (shifted and interpolated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.process.schedules.base import check_range


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Cosine schedule clipped to [logsnr_min, logsnr_max]; either end may be infinite.

    Raises:
        ValueError: If the range is empty.
    """

    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self) -> None:
        check_range(self.logsnr_min, self.logsnr_max)

    @property
    def _angles(self) -> tuple[float, float]:
        theta0, theta1 = (
            math.atan(math.exp(-0.5 * end)) for end in (self.logsnr_max, max(self.logsnr_min, -1400))
        )
        return theta0, (0.5 * math.pi if math.isinf(self.logsnr_min) else theta1)

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`. Exactly +inf at u = 0 and -inf at u = 1 where the range is infinite."""
        theta0, theta1 = self._angles
        logsnr = -2.0 * torch.log(torch.tan(theta0 + u * (theta1 - theta0)))
        # tan(pi / 2) is large but finite in floating point
        return torch.where(u == 1.0, torch.full_like(logsnr, self.logsnr_min), logsnr)

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        theta0, theta1 = self._angles
        return (torch.atan(torch.exp(-0.5 * logsnr)) - theta0) / (theta1 - theta0)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`: p = sech(logsnr / 2) / (4 (theta1 - theta0))."""
        theta0, theta1 = self._angles
        half = 0.5 * logsnr.abs()
        log_cosh = half + F.softplus(-2.0 * half) - math.log(2.0)
        return -log_cosh - math.log(4.0 * (theta1 - theta0))


@dataclass(frozen=True, kw_only=True)
class ShiftedCosine:
    """Cosine schedule shifted by 2 log(reference_size / size) for images of side `size`.

    Args:
        size: Side of the images, in pixels.
        reference_size: Side at which the plain cosine is right; 32 or 64 in the paper.
        logsnr_min: Lower end.
        logsnr_max: Upper end.
        keep_range: If true the shifted schedule still spans exactly [logsnr_min, logsnr_max]; if false both ends move
            by the shift, which is the paper's formula read literally.

    Raises:
        ValueError: If the range is empty or a size is not positive.
    """

    size: int
    reference_size: int = 64
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0
    keep_range: bool = True

    def __post_init__(self) -> None:
        check_range(self.logsnr_min, self.logsnr_max)
        if self.size < 1 or self.reference_size < 1:
            raise ValueError("ShiftedCosine needs positive sizes")

    @property
    def shift(self) -> float:
        """2 log(reference_size / size): negative for images larger than the reference."""
        return 2.0 * math.log(self.reference_size / self.size)

    @property
    def _base(self) -> Cosine:
        inset = self.shift if self.keep_range else 0.0
        return Cosine(logsnr_min=self.logsnr_min - inset, logsnr_max=self.logsnr_max - inset)

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        return self._base(u) + self.shift

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        return self._base.inverse(logsnr - self.shift)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        return self._base.log_density(logsnr - self.shift)


@dataclass(frozen=True, kw_only=True)
class InterpolatedCosine:
    """u shifted_high(u) + (1 - u) shifted_low(u): simple diffusion's schedule for 512 pixels (low 32, high 256).

    The inverse has no closed form; it is found by bisection to the last bit of float64.

    Args:
        size: Side of the images, in pixels.
        low: Smaller reference side: strong shift, rules the clean end.
        high: Larger reference side: weak shift, rules the noisy end.
        logsnr_min: Lower end.
        logsnr_max: Upper end.
        keep_range: As in `ShiftedCosine`.

    Raises:
        ValueError: If the range is empty, `low > high`, or the two references are so far apart that the schedule would
            not fall everywhere.
    """

    size: int
    low: int = 32
    high: int = 256
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0
    keep_range: bool = True

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"InterpolatedCosine needs low <= high, got {self.low} and {self.high}")
        u = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64, device="cpu")[1:-1]
        if not bool(torch.all(self._slope(u) < 0)):
            raise ValueError(
                f"references {self.low} and {self.high} are too far apart: the schedule would rise somewhere"
            )

    def _shifted(self, reference: int) -> ShiftedCosine:
        return ShiftedCosine(
            size=self.size,
            reference_size=reference,
            logsnr_min=self.logsnr_min,
            logsnr_max=self.logsnr_max,
            keep_range=self.keep_range,
        )

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        low, high = self._shifted(self.low)(u), self._shifted(self.high)(u)
        # equal ends may be infinite, where lerp meets inf - inf
        return torch.where(low == high, low, torch.lerp(low, high, u))

    def _slope(self, u: Tensor) -> Tensor:
        low, high = self._shifted(self.low), self._shifted(self.high)
        at_low, at_high = low(u), high(u)
        return (
            at_high
            - at_low
            - u * torch.exp(-high.log_density(at_high))
            - (1 - u) * torch.exp(-low.log_density(at_low))
        )

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`; 60 halvings of [0, 1], float64 inside."""
        target = logsnr.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = 0.5 * (low + high)
            cleaner = self(middle) > target
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        return (0.5 * (low + high)).to(logsnr.dtype)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`: minus the log of the slope at the inverse."""
        return -torch.log(-self._slope(self.inverse(logsnr.double()))).to(logsnr.dtype)
