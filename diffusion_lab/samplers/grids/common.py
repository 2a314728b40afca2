"""What every grid does: check the number of steps, and end at +inf."""

from __future__ import annotations

import math

from torch import Tensor, cat


def closed(levels: Tensor) -> Tensor:
    """Append +inf."""
    return cat([levels, levels.new_tensor([math.inf])])


def check_steps(steps: int) -> None:
    """Raise ValueError unless `steps` is positive."""
    if steps < 1:
        raise ValueError(f"a sampling grid needs at least one step, got steps={steps}")
