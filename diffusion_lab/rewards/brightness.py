r"""Brightness: the mean of the pixels.

    r(x0) = mean of x0's D numbers

In closed form on Gaussian data: p(x0) = N(m, S) tilted by exp(lambda r) is N(m + lambda S 1 / D, S).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusion_lab.typing import Cond


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """Mean pixel, in the units of the data: about [-1, 1] for images."""

    def __call__(self, x0: Tensor, cond: Cond | None = None) -> Tensor:
        """Return `(B,)` for `x0` `(B, *D)`; `cond` is ignored."""
        return x0.flatten(1).mean(1)
