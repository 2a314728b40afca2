r"""JPEG's loss: cosine coefficients of 8 x 8 blocks, rounded to multiples of a table that grows as quality falls.

    c = DCT(127.5 x0),     y = IDCT(T round(c / T)) / 127.5,      T = clip(floor((s T_50 + 50) / 100), 1, 255),
    s = 5000 / quality below 50,  200 - 2 quality from 50 on.

Pixels in [-1, 1] are so measured in JPEG's steps of 1 / 255 of the range. y is the decoded image, not clipped; every
channel uses the luminance table, without JPEG's change of colours and its halved colour resolution. Rounding has no
derivative; its gradient is taken to be that of the identity (straight-through), under which A looks like no loss at
all.

Images with a side below 8 have blocks of that side n, whose frequency k is as high as 8 k / n of an 8-block. A cosine
of the orthonormal transform has height sqrt(2 / n), so a coefficient of a picture f is

    c_kl = sum_ij f_ij (2 / n) cos_i cos_j = 2 n mean_ij (f_ij cos_i cos_j),

n / 8 as large for the same picture; and so are the steps there, T n / 8. JPEG shifts bytes by 128, this by 127.5, the
middle of [0, 255].

References:
    Wallace, "The JPEG Still Picture Compression Standard", 1992; table of annex K of ITU-T T.81; scaling of libjpeg.
    Song et al., "Pseudoinverse-Guided Diffusion Models for Inverse Problems", 2023 (JPEG restoration).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from diffusion_lab.measurements.base import image_sides

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
# half of 255: the length of [-1, 1] in steps of a byte
STEPS = 127.5


@dataclass(frozen=True, kw_only=True)
class JPEGLike:
    """JPEG's quantisation, straight through for gradients.

    Attributes:
        quality: 1 to 100, libjpeg's.

    Raises:
        ValueError: If `quality` is outside [1, 100], or (at call) the block does not divide both sides of the image.
    """

    quality: float = 20.0

    linear = False

    def __post_init__(self) -> None:
        if not 1.0 <= self.quality <= 100.0:
            raise ValueError(f"JPEGLike needs quality in [1, 100], got {self.quality}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return decoded images `(B, C, H, W)` of images in [-1, 1]."""
        H, W = image_sides(self, x0)
        n = min(8, H, W)
        if H % n or W % n:
            raise ValueError(f"JPEGLike: blocks of {n} x {n} do not divide an image of {H} x {W} pixels")
        C, table = _dct_matrix(n).to(x0), n / 8 * quantisation_table(self.quality, n).to(x0)
        blocks = (STEPS * x0).unflatten(3, (-1, n)).unflatten(2, (-1, n)).transpose(3, 4)
        c = C @ blocks @ C.T / table
        # the value of the rounded, the derivative of the unrounded
        rounded = c + (torch.round(c) - c).detach()
        decoded = C.T @ (table * rounded) @ C
        return decoded.transpose(3, 4).reshape(x0.shape) / STEPS


@lru_cache(maxsize=32)
def quantisation_table(quality: float, n: int = 8) -> Tensor:
    """Return T `(n, n)`, float64, for blocks of side n; kept, so do not write to it."""
    # made once and used everywhere: a tensor made in inference mode could not enter a gradient later
    with torch.inference_mode(False):
        scale = 5000.0 / quality if quality < 50.0 else 200.0 - 2.0 * quality
        table = torch.tensor(LUMINANCE, dtype=torch.float64)
        k = torch.arange(n) * 8 // n
        return torch.floor((scale * table[k][:, k] + 50.0) / 100.0).clamp(1.0, 255.0)


@lru_cache(maxsize=8)
def _dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II `(n, n)`, row k the cosine of frequency k."""
    with torch.inference_mode(False):
        i, k = torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64)[:, None]
        C = math.sqrt(2.0 / n) * torch.cos(math.pi / (2 * n) * (2 * i + 1) * k)
        C[0] = math.sqrt(1.0 / n)
        return C
