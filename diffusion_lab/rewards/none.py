"""No reward: what stands where a reward could be given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.typing import Cond


@dataclass(frozen=True, kw_only=True)
class NoReward:
    """Every sample is worth 0."""

    def __call__(self, x0: Tensor, cond: Cond | None = None) -> Tensor:
        """Return zeros `(B,)` for `x0` `(B, *D)`."""
        return torch.zeros(len(x0), device=x0.device, dtype=x0.dtype)
