r"""The log-likelihood of a measurement, which makes a particle method a posterior sampler.

    y = A(x0) + noise n,    n ~ N(0, I):        r(x0) = -|y - A(x0)|^2 / (2 noise^2)

With lambda = 1 the tilted law is p(x0 | y), exactly, in the limit of many particles. A sharp likelihood, of little
noise or of many numbers, leaves few particles alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.typing import MEASUREMENT, Cond


@dataclass(frozen=True, kw_only=True)
class MeasurementLikelihood:
    """log p(y | x0) up to a constant, y being `cond["measurement"]` `(B, *M)`.

    Attributes:
        operator: A, from `(B, *D)` to `(B, *M)`; linear or not. A mask blanks the same entries of both.
        noise: Standard deviation of the measurement's noise.

    Raises:
        ValueError: If (at call) there is no operator or no noise, or y is missing or of another shape.
    """

    operator: Callable[[Tensor], Tensor] | None
    noise: float

    def __call__(self, x0: Tensor, cond: Cond | None = None) -> Tensor:
        """Return `(B,)` in nats, at most 0, for `x0` `(B, *D)`."""
        if self.operator is None or not self.noise > 0.0:
            raise ValueError(
                "MeasurementLikelihood needs an operator and noise > 0, got "
                f"{type(self.operator).__name__} and {self.noise}"
            )
        if cond is None or MEASUREMENT not in cond:
            raise ValueError(f"MeasurementLikelihood needs the measurement in cond['{MEASUREMENT}']")
        predicted, y = self.operator(x0), cond[MEASUREMENT]
        if y.shape != predicted.shape:
            raise ValueError(
                f"cond['{MEASUREMENT}'] has shape {tuple(y.shape)}, but {type(self.operator).__name__} makes "
                f"{tuple(predicted.shape)} of these samples"
            )
        known = getattr(self.operator, "known", None)
        residual = y.to(predicted) - predicted
        if known is not None:
            residual = torch.where(known(x0) > 0, residual, 0.0)
        return -residual.flatten(1).square().sum(1) / (2.0 * self.noise**2)
