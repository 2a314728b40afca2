r"""Between model space and pixels, in one place.

Models work on floats in [-1, 1]; files, screens and feature extractors on the 256 levels of a byte:

    level = round((x + 1) 127.5), clamped to 0..255          x = level / 127.5 - 1

Rounding, not flooring: `(x * 255).byte()` and its kin shift every image down by half a level, one of the ways in
which two Fréchet distances of the same model come to differ (Parmar et al., "On Aliased Resizing and Surprising
Subtleties in GAN Evaluation", 2022, section 3.2 on quantisation). The round trip of a byte is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTISATION = "uint8 round((x+1)*127.5)"
"""How `to_uint8` quantises, as evaluation records print it."""


def to_uint8(x: Tensor) -> Tensor:
    """Quantise floats in [-1, 1], of any shape, to bytes; values outside are clamped.

    Raises:
        TypeError: If `x` is not a floating-point tensor (bytes must not be scaled twice).
        ValueError: If a value is nan: that is a broken sample, not a black pixel.
    """
    if not x.is_floating_point():
        raise TypeError(f"to_uint8 takes floats in [-1, 1], not {x.dtype}")
    if x.isnan().any():
        bad = int(x.isnan().flatten(1).any(dim=1).sum()) if x.ndim > 1 else int(x.isnan().sum())
        raise ValueError(f"{bad} of {len(x) if x.ndim else 1} images hold nan and cannot become bytes")
    wide = x if x.dtype == torch.float64 else x.float()  # half precision cannot hold the levels' halves
    return ((wide + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def visible(latents: Tensor) -> Tensor:
    """Return latents `(B, C, H, W)` of about unit variance as bytes `(B, 3 or 1, H, W)`.

    The first channels, within +-3: no picture of what they stand for, but enough to see that they are not noise.
    """
    return to_uint8(latents[:, :3] / 3.0) if latents.shape[1] >= 3 else to_uint8(latents[:, :1] / 3.0)


def to_float(images: Tensor) -> Tensor:
    """Return bytes as float32 in [-1, 1].

    Raises:
        TypeError: If `images` is not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"to_float takes uint8, not {images.dtype}")
    return images.float() / 127.5 - 1.0


def spread(length: int, n: int) -> Tensor:
    """Return `n` of the indices 0 to `length` - 1, one at random in each of `n` equal parts; all if there are no more.

    At even distances they would be in step with samples whose classes come in turn, and leave classes out. Always the
    same ones.
    """
    n = min(n, length)
    edges = torch.arange(n + 1, dtype=torch.int64) * length // max(n, 1)
    place = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return edges[:-1] + (place * edges.diff()).long()
