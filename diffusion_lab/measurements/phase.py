r"""Phase retrieval: only the magnitude of an image's Fourier transform is measured.

    y = |F pad(x0)|,      F the orthonormal 2-D discrete Fourier transform

Zeros around the image make it `oversample` times as long on each side, without which the magnitudes do not determine
it. Even so the image, its negative, and its rotation by 180 degrees (together with shifts inside the zeros) have the
same magnitudes, so a posterior sampler may return any of them.

References:
    Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", 2023, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusion_lab.measurements.base import image_sides


@dataclass(frozen=True, kw_only=True)
class PhaseRetrieval:
    """Magnitude of the oversampled Fourier transform.

    Attributes:
        oversample: Length of the padded sides in lengths of the image's, at least 1.

    Raises:
        ValueError: If `oversample` is below 1, or (at call) samples are no images.
    """

    oversample: float = 2.0

    linear = False

    def __post_init__(self) -> None:
        if not self.oversample >= 1.0:
            raise ValueError(f"PhaseRetrieval needs oversample >= 1, got {self.oversample}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return magnitudes `(B, C, H', W')`, H' = round(oversample H), of images `(B, C, H, W)`."""
        H, W = image_sides(self, x0)
        more_rows, more_columns = round(self.oversample * H) - H, round(self.oversample * W) - W
        padded = pad(x0, (0, more_columns, 0, more_rows))
        return torch.fft.fft2(padded, norm="ortho").abs()
