"""A grid that is a list of log-SNRs: your own, or what a fitted grid came out as."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.samplers.grids.common import closed


def from_logsnrs(logsnrs: Sequence[float], origin: str | None = None) -> Tensor:
    """Return the grid of increasing log-SNRs; +inf is added where it is not the last, `(steps + 1,)`.

    Args:
        logsnrs: Levels, increasing.
        origin: Where they come from, for the record; it changes nothing.

    Raises:
        ValueError: If the levels do not increase or there are none.
    """
    levels = torch.tensor(list(logsnrs), dtype=torch.float64)
    levels = levels[:-1] if len(levels) > 1 and bool(torch.isposinf(levels[-1])) else levels
    if len(levels) == 0 or not bool((levels.diff() > 0).all()) or bool(torch.isposinf(levels).any()):
        raise ValueError("from_logsnrs needs log-SNRs in increasing order")
    return closed(levels)
