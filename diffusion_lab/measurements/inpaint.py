r"""Inpainting: pixels are known or missing, y = mask * x0.

    box       a rectangle is missing
    half      one half of the image is missing, split down the middle
    random    a fraction of the pixels is missing, the same ones in every image of one shape

The mask is 1 where a pixel is known and holds for all channels; y has the shape of the image, with zeros for what is
missing. Random masks belong to `seed` and to the image's size, so a measurement can be repeated.

References:
    Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", 2023, section 4 (box and random).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.measurements.base import image_sides
from diffusion_lab.rng import derive_seed


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Keep the known pixels.

    Attributes:
        mask: Which of the three below.
        box: `(top, left, height, width)` of the missing rectangle, as fractions of the sides.
        side: The missing half.
        fraction: Of the pixels that are missing at random, in (0, 1).
        seed: Of the random mask.

    Raises:
        ValueError: If the mask is unknown, the box is not inside the image or the fraction not inside (0, 1), or (at
            call) the image is so small that no pixel, or every pixel, is missing.
    """

    mask: Literal["box", "half", "random"] = "box"
    box: Sequence[float] = (0.25, 0.25, 0.5, 0.5)
    side: Literal["left", "right", "top", "bottom"] = "right"
    fraction: float = 0.7
    seed: int = 0

    linear = True

    def __post_init__(self) -> None:
        if self.mask not in ("box", "half", "random") or self.side not in ("left", "right", "top", "bottom"):
            raise ValueError(
                "Inpaint needs mask box, half or random and side left, right, top or bottom, "
                f"got {self.mask} and {self.side}"
            )
        if len(self.box) != 4:
            raise ValueError(f"Inpaint needs box = (top, left, height, width), got {tuple(self.box)}")
        top, left, height, width = self.box
        if not (min(top, left) >= 0 and min(height, width) > 0 and max(top + height, left + width) <= 1):
            raise ValueError(f"Inpaint needs a box inside the image, in fractions, got {tuple(self.box)}")
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"Inpaint needs fraction in (0, 1), got {self.fraction}")

    def known(self, x0: Tensor) -> Tensor:
        """Return the mask `(1, 1, H, W)` of images `x0` `(B, C, H, W)`."""
        H, W = image_sides(self, x0)
        mask = _mask(self.mask, tuple(self.box), self.side, self.fraction, self.seed, H, W)
        if bool(mask.all()) or not bool(mask.any()):
            raise ValueError(
                f"Inpaint ({self.mask}) leaves {int(mask.sum())} of {H} x {W} pixels known: some must be known and "
                "some missing"
            )
        return mask.to(x0)

    def __call__(self, x0: Tensor) -> Tensor:
        """Return `x0` `(B, C, H, W)` with zeros for the missing pixels."""
        return self.known(x0) * x0


@lru_cache(maxsize=32)
def _mask(mask: str, box: tuple[float, ...], side: str, fraction: float, seed: int, H: int, W: int) -> Tensor:
    # made once and used everywhere: a tensor made in inference mode could not enter a gradient later
    with torch.inference_mode(False):
        known = torch.ones(H, W)
        if mask == "random":
            rng = torch.Generator().manual_seed(derive_seed("inpaint", seed))
            missing = torch.randperm(H * W, generator=rng)[: round(fraction * H * W)]
            known.view(-1)[missing] = 0.0
        elif mask == "half":
            halves = {
                "left": (slice(None), slice(0, W // 2)),
                "right": (slice(None), slice(W // 2, None)),
                "top": (slice(0, H // 2), slice(None)),
                "bottom": (slice(H // 2, None), slice(None)),
            }
            known[halves[side]] = 0.0
        else:
            top, left, height, width = box
            rows = slice(round(top * H), round((top + height) * H))
            columns = slice(round(left * W), round((left + width) * W))
            known[rows, columns] = 0.0
        return known[None, None]
